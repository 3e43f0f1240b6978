"""The definition of every operator in plain torch, in any precision."""
