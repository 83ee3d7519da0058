"""What the HTML pages share: the templates, compiled, and their common parts."""
