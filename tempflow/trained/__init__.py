"""What a run has learnt, taken up again: opened, sampled from, evaluated."""
