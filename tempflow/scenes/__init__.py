"""The harder embedded benchmark: coloured digits on a 3x3 canvas, with the prompts and the rules of GenEval."""
