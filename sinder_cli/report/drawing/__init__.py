"""How results become pictures: charts, and maps of patch tokens as colours."""
