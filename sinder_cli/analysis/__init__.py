"""Analysis of a backbone's tokens over a set of images: statistics, verdicts, comparisons, maps to draw."""
