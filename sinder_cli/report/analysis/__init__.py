"""What `sinder analyze --out` leaves: a folder with figures over all images, figures of single images, and a page."""
