#!/bin/bash
# One GPU of 24 GB: adapters of Stable Diffusion 3.5 medium with PickScore, 512 pixels. The weights are downloaded from
# the hub (accept their licence there first); prompts/pickscore holds train.txt and test.txt, a prompt a line.
set -e
tempflow doctor
tempflow train sd35_medium_24gb prompts.train=prompts/pickscore/train.txt prompts.test=prompts/pickscore/test.txt \
    run.resume=auto run.save_every=10
