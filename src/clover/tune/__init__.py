"""Stage 2: instruction tuning through the frozen language model."""
