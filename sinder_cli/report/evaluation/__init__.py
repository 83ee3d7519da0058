"""The page, the table of values and the pictures of an evaluation."""
