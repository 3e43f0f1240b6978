"""Drop-in functions with the signatures of other projects."""
