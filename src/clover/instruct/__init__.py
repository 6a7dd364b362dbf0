"""Stage A: captions in, checked instructions out, every cent accounted."""
