#!/bin/bash
# Trains with the scorer of own_scorer.py, which lies in this folder; any machine, a few minutes.
set -e
cd "$(dirname "$0")"
tempflow train digits reward.name=own_scorer:blueness reward.gold=digits_gold learn.iterations=20 run.dir=runs/blue
