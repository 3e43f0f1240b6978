"""Runs on 1, 2 and 4 processes: `spread_runs.py FOLDER`, all of `RUNS`, one after the other.

Processes are forked from one that has imported everything, which takes longer than their runs. Each leaves
FOLDER/SIZE/CASE (a run's folder) and FOLDER/SIZE/CASE.RANK.safetensors: what it drew, sampled, scored and was credited
with, chunk by chunk and iteration by iteration.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tempflow import train
from tempflow.parallel import ranks as processes
from tempflow.run.assembly import set_up
from tempflow.settings.reading import load

SMALL = ["digits", "explore.prompts=4", "explore.noises=1", "explore.siblings=3", "explore.forks=[0,3]",
         "sample.steps=5", "learn.lr=1e-3", "learn.lr_schedule=constant", "learn.rows=1", "learn.eps=1e-3",
         "tails.rows=3", "reward.rows=3", "eval.every=0", "prompts.test=null", "learn.ema_every=1",
         "learn.iterations=3", "run.save_every=0", "run.trackers=[]", "run.device=cpu"]  # fmt: skip
"""Every network call has the same rows on 1, 2 and 4 processes: a trunk, or the siblings of one fork of one trunk."""

LORA = ["credit.idle=drop", "reward.name=spread_runs:only_one_prompt_tells"]
FULL = ["model.train=full", "objective.kl=0.01"]
SHARED, COPY = ["parallel.shard=full"], ["parallel.merged=sharded"]
CASES = {
    "lora": LORA,
    "lora_shared": [*LORA, *SHARED, *COPY],
    "full": FULL,
    "full_shared": [*FULL, *SHARED],
    "full_hybrid": [*FULL, *COPY, "parallel.shard=hybrid", "parallel.per_node=2"],
}
RUNS = {
    1: ("lora", "full"),
    2: ("lora_shared", "full_shared"),
    4: ("lora", "full_hybrid"),
}


def only_one_prompt_tells(images, prompts):
    """A scorer that likes images of all prompts but one alike: most processes have nothing to learn."""
    levels = images.float().mean((1, 2, 3)) / 255
    told = torch.tensor([prompt.text == TELLING for prompt in prompts])
    return torch.where(told, levels, 0.5)


TELLING = ""


class Records:
    """Keeps what passes through a training step."""

    def __init__(self):
        self.kept: dict[str, list[torch.Tensor]] = {}

    def keep(self, name, value):
        self.kept.setdefault(name, []).append(value.detach().clone().contiguous())

    def watch(self, trainer):
        submit, decode = trainer.scores.submit, trainer.scores._decode

        def submitting(branches, prompts):
            self.keep("places", branches.places)
            self.keep("latents", branches.latents)
            submit(branches, prompts)

        def decoding(*arguments):
            images = decode(*arguments)
            self.keep("images", images.images)
            return images

        trainer.scores.submit, trainer.scores._decode = submitting, decoding

    def crediting(self, rewards, *arguments):
        credit = GIVE_CREDIT(rewards, *arguments)
        self.keep("rewards", rewards)
        self.keep("advantages", credit.advantages)
        return credit

    def tensors(self):
        return {f"{name}.{place:03d}": value for name, values in self.kept.items() for place, value in
                enumerate(values)}  # fmt: skip


GIVE_CREDIT = train.give_credit


def run(folder, case, *more):
    """One run of this process."""
    records = Records()
    trainer, journal, progress = set_up(load([*SMALL, *CASES[case], f"run.dir={folder / case}", *more]))
    global TELLING
    TELLING = trainer.feed.prompts[0].text
    records.watch(trainer)
    records.keep("noise", trainer.feed.at(0)[1].initial_noise(trainer.policy.latent_shape))
    train.give_credit = records.crediting
    try:
        train.train(trainer, journal, progress)
    finally:
        train.give_credit = GIVE_CREDIT
    save_file(records.tensors(), folder / f"{case}.{trainer.ranks.rank}.safetensors")


def work(folder, size, rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    sys.modules["spread_runs"] = sys.modules["__main__"]
    for case in RUNS[size]:
        run(folder / str(size), case)
    processes.stop()


def main(folder):
    for size in RUNS:
        (folder / str(size)).mkdir(parents=True)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork").Process
        started = [fork(target=work, args=(folder, size, rank, port)) for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
