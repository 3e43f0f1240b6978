"""Trunks, forks, decisions, tails."""
