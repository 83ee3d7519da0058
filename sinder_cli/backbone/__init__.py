"""Vision Transformers as sinder handles them: layer maps, weights, and the plugins that provide both."""
