"""What `sinder repair` leaves for people: an offline HTML page and a model card."""
