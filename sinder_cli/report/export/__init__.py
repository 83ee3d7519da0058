"""What is written about an export: the model card of its folder."""
