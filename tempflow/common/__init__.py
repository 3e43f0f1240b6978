"""What every room may use: errors, words, files, tensors, clocks, draws."""
