"""GenEval: words, prompts, detection, scores."""
