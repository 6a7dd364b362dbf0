"""Stage 1: align images and text with three losses, one file each."""
