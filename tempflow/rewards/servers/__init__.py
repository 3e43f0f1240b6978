"""Scorers on other machines."""
