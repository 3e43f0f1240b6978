#!/bin/bash
# Any machine, no GPU, no download: the embedded pipeline, five to ten minutes. Once with the default method, once with
# Flow-GRPO's, side by side in runs/tempflow and runs/flow_grpo.
set -e
tempflow train digits run.dir=runs/tempflow
tempflow train digits flow_grpo run.dir=runs/flow_grpo
