"""Rows of like length together: how a batch is cut so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence


def length_groups(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Cut a batch into groups with the least padded tokens plus overhead.

    Args:
        lengths: tokens of each row.
        overhead: what one more forward pass costs, in tokens.

    Returns:
        Row indices of each group. Short and long rows part when padding would cost more than
        another pass; with a large overhead everything stays together.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n rows, start of the last group
    for end in range(1, len(order) + 1):
        best.append(
            min(
                (best[start][0] + (end - start) * lengths[order[start]] + overhead, start)
                for start in range(end)
            )
        )
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]
