"""Experiment trackers: where the numbers and pictures of a run go besides metrics.jsonl, each by one word."""

from tempflow.records.trackers.adapters import TRACKERS, check_trackers
from tempflow.records.trackers.told import Trackers

__all__ = ["TRACKERS", "Trackers", "check_trackers"]
