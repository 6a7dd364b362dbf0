"""One self-contained HTML page for a run: scores with controls, losses, data, examples, the bill.

In: run folders, each of whose parts may be missing. Out: one file that needs nothing else.
"""
