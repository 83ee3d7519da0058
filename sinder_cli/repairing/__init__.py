"""How defects are removed: the gradient of a neighbourhood loss, projected onto singular values."""
