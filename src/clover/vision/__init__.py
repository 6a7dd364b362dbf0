"""Frozen image encoders and the cache of what they saw."""
