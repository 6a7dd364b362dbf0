"""Slides: microns per pixel, one reader for every format, tissue, regions and fields."""
