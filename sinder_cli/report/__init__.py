"""Results for people: terminal tables, JSON documents, figures, offline HTML pages, a model card and a manual page."""
