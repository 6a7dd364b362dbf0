"""The one training loop; it knows devices and steps, and nothing of losses."""
