"""What is read of a model's files, and what is refused before or after that."""
