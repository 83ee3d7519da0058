"""The removal of defects: the gradient of a neighbourhood loss, projected onto singular values."""
