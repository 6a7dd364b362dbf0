"""Stage 3: predictions, scores with intervals, baselines and controls."""
