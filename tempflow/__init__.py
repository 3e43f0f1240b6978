"""TempFlow-GRPO: trajectory branching, noise-aware weighting and seed groups for flow-matching models."""
