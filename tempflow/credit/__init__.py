"""What a branch's reward says about its decisions."""
