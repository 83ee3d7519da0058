"""What a repair changed, for people: figures, one offline HTML page and a model card."""
