#!/bin/bash
# One node of 8 GPUs: the paper's PickScore run. A process that is lost is begun again, at most three times, and the run
# goes on from its newest checkpoint.
set -e
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store for each start: in a kept one a dead process may be listened to
torchrun --standalone --nproc-per-node=8 --max-restarts=3 \
    -m tempflow train sd35_pickscore run.dir=runs/sd35_pickscore run.resume=auto run.save_every=10
