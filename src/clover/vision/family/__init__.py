"""Families of image encoders: one file each, found by its name.

A file `family/NAME.py` makes `encoder.kind: NAME` work. It has one function,
`build(config) -> Family`; see docs/models.md.
"""
