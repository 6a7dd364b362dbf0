"""The web page: a slide viewer in which one draws a region and asks."""
