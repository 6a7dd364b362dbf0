"""The Q-Former: queries that learn to read an image and speak the language model's language."""
