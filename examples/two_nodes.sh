#!/bin/bash
# Two nodes of 8 GPUs, without a scheduler: the same line on each; HEAD is the name of one of them. All of FLUX.1-dev is
# trained, in shares of a node's GPUs; run.dir has to lie where both nodes see it.
set -e
HEAD=${1:?usage: two_nodes.sh NAME_OF_THE_FIRST_NODE}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29400" --rdzv-id=flux \
    -m tempflow train flux1_dev_full_8x80gb parallel.shard=hybrid learn.rows=2 run.dir=/shared/runs/flux run.resume=auto
