"""Scripts that load an export by its library alone; they import nothing of sinder."""
