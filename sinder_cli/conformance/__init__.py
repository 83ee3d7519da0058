"""What a plugin must satisfy, checked: one small question at a time, each answered by a record."""
