"""How branches travel from a fork to an image."""
