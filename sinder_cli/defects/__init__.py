"""The prediction of defects from the weights, and their detection in the tokens."""
