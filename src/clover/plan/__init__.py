"""Memory, time and money of a recipe, before anything is started."""
