"""Drawing of results: charts, and maps of patch tokens as colours."""
