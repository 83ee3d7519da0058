"""Checks of what a plugin must satisfy: each is one small question, answered by a record."""
