"""The digits benchmark: a tiny text-to-image pipeline with prompts, a reward and a strict judge."""
