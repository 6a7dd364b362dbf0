"""The built-in set: synthetic histology whose truth is known, with captions and questions."""
