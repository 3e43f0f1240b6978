"""What is known of a model before any weight is loaded."""
