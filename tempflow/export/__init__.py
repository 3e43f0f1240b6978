"""What a run has learnt, in the files that other programs open."""
