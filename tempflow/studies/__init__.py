"""Measuring without training."""
