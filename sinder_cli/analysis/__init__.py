"""What the tokens of a backbone do over a set of images: statistics, verdicts, comparisons, maps to draw."""
