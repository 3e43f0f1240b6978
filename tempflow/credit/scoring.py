"""Finished branches to rewards: decoded and scored beside the sampling of the next ones, where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.common.tensors import chunks
from tempflow.explore.rollout import FinishedBranches
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Policy
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer


class DirectExecutor(Executor):
    """An executor that does the work at once, in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
        done: Future = Future()
        try:
            done.set_result(function(*arguments, **named))
        except BadInput as error:  # raised again where the result is asked for, as in a thread
            done.set_exception(error)
        return done


class ScoreQueue:
    """Takes finished latents chunk by chunk and gives their rewards in the same order.

    With `overlap`, decoding runs in a thread of its own (on a GPU in a stream of its own) and scoring in others: the
    sampler goes on meanwhile. It helps where the scorer waits for another machine, or where kernels of a GPU can
    fill each other's gaps; on a CPU alone it would only divide the cores, so there the work is done in turn.
    """

    def __init__(self, policy: Policy, reward: Scorer | Panel, rows: int, clock: PhaseClock, overlap: bool):
        self.policy, self.reward, self.rows, self.clock = policy, reward, rows, clock
        on_gpu = policy.device.type == "cuda"
        self.overlap = overlap and (on_gpu or reward.parallel > 0)
        self.decoder: Executor = ThreadPoolExecutor(1, "decode") if self.overlap else DirectExecutor()
        judges = max(1, reward.parallel)
        self.judge: Executor = ThreadPoolExecutor(judges, "score") if self.overlap else DirectExecutor()
        self.stream = torch.cuda.Stream(policy.device) if self.overlap and on_gpu else None
        self.pending: list[Future] = []
        self.places: list[Tensor] = []

    def submit(self, branches: FinishedBranches, prompts: Sequence[Prompt]) -> None:
        """Branches whose latents are not written to before `collect`; `prompts` are those of the trunks."""
        ready = torch.cuda.current_stream().record_event() if self.stream is not None else None
        images = self.decoder.submit(self._decode, branches.latents, ready)
        self.pending.append(self.judge.submit(self._score, images, [prompts[row] for row in branches.trunks]))
        self.places.append(branches.places)

    def collect(self) -> Tensor:
        """Rewards fp32 of all branches since the last `collect`, at their places: (B), (M, B) from a panel of M.

        Raises:
            BadInput: what a scorer raised; the queue is empty then, too.
        """
        pending, places = self.pending, torch.cat(self.places)
        self.pending, self.places = [], []
        try:
            travelled = torch.cat([future.result() for future in pending], dim=-1)
            return torch.empty_like(travelled).index_copy_(-1, places, travelled)
        finally:
            for future in pending:
                future.cancel()

    def _decode(self, latents: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        with self._own_stream(), self.clock("decode"):
            if ready is not None:
                ready.wait()
            return decode_branches(self.policy, latents, self.rows)

    def _score(self, images: Future, prompts: Sequence[Prompt]) -> Tensor:
        decoded = images.result()
        with self._own_stream(), self.clock("reward"):
            return self.reward(decoded, prompts)

    def _own_stream(self) -> AbstractContextManager[Any]:
        """The queue's own stream, where it has one."""
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()


@torch.no_grad()
def decode_branches(policy: Policy, latents: Tensor, rows: int) -> Tensor:
    """(..., D...) finished latents to uint8 images (..., 3, H, W) on the CPU, `rows` a call."""
    flat = latents.view(-1, *policy.latent_shape)
    images = torch.empty(len(flat), *policy.image_shape, dtype=torch.uint8)
    for part in chunks(len(flat), rows):
        images[part] = policy.decode(flat[part]).cpu()
    leading = latents.shape[: latents.dim() - len(policy.latent_shape)]
    return images.view(*leading, *policy.image_shape)


def collect_rewards(scores: ScoreQueue, panel: Panel, ranks: Ranks, shape: Sequence[int]) -> Tensor:
    """(V, M, S, R of all ranks, K) fp32 rewards of the branches submitted since; NaN where a scorer has no opinion.

    Args:
        shape: V, S, R of this rank, K.
    Raises:
        BadInput: on all ranks, where a scorer failed on one of them, or has no opinion at all.
    """
    tails, forks, _, siblings = shape
    own = ranks.agree(scores.collect)
    rewards = ranks.gather(own.view(len(own), tails, forks, -1, siblings), dim=3)
    panel.check_opinions(rewards)
    return rewards.transpose(0, 1)
