"""Image sources, and the way from an image to a normalized tensor."""
