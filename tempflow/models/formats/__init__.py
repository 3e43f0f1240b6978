"""Files that other programs read: names of layers and of tensors, and whole pipelines."""
