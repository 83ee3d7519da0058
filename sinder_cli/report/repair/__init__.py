"""Readable output of a repair: an offline HTML page, pictures, and the facts that page, card and table share."""
