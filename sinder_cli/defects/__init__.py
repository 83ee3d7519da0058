"""Where defects come from (the weights) and where they show (the tokens)."""
