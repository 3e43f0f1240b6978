"""What a reward can tell apart, step by step, without training."""
