"""Writing a backbone where people load models: one module per target format, and the check of what was written."""
