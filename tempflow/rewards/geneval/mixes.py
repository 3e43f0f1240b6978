"""In which proportions prompts ask for what."""

FLOW_GRPO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
"""Proportions of Flow-GRPO's training prompts (arXiv 2505.05470): more of what the model before training fails at."""
EVEN = dict.fromkeys(FLOW_GRPO, 1)
MIXES = {"flow_grpo": FLOW_GRPO, "even": EVEN}
