"""Objectives, updates, optimizers."""
