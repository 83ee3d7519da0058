"""Output folder of `sinder analyze --out`: figures over all images, figures of single images, and a page."""
