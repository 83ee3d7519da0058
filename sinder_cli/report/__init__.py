"""Results for readers: terminal tables, JSON documents, figures, offline HTML pages, model cards, a manual page."""
