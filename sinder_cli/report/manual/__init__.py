"""The manual page that is made from the records of an analysis, and the roff of all of them."""
