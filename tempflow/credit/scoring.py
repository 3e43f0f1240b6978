"""Finished branches to rewards: decoded and scored beside the sampling of the next ones, where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.credit.decoding import Decoded, check_lost, decode_branches
from tempflow.explore.rollout import FinishedBranches
from tempflow.parallel.ranks import Ranks
from tempflow.policy import ImageDecoder
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


def workers(name: str, count: int, device: torch.device) -> Executor:
    """Threads that share one CUDA stream, which nothing else uses, where `device` is a GPU.

    One for all judges: scorers on this GPU work one at a time anyway, and torch keeps freed memory for each stream.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(count, name)
    return ThreadPoolExecutor(count, name, torch.cuda.set_stream, (torch.cuda.Stream(device),))


class ScoreQueue:
    """Takes finished latents chunk by chunk and gives their rewards in the same order.

    With `overlap`, decoding runs in a thread of its own and scoring in others, on a GPU each in a stream of its own:
    the sampler goes on meanwhile. It helps where the scorer waits for another machine, or where kernels of a GPU can
    fill each other's gaps; on a CPU alone it would only divide the cores, so there the work is done in turn.
    """

    def __init__(self, decoder: ImageDecoder, reward: Scorer | Panel, rows: int, clock: PhaseClock, overlap: bool):
        self.decoder, self.reward, self.rows, self.clock = decoder, reward, rows, clock
        on_gpu = decoder.device.type == "cuda"
        self.overlap = overlap and (on_gpu or reward.parallel > 0)
        judges = max(1, reward.parallel)
        self.decoding = workers("decode", 1, decoder.device) if self.overlap else DirectExecutor()
        self.judge = workers("score", judges, decoder.device) if self.overlap else DirectExecutor()
        self.beside = self.overlap and on_gpu
        self.pending: list[Future] = []
        self.places: list[Tensor] = []
        self.lost: list[Tensor] = []
        """of each chunk since the last `collect_rewards`, the counts of `Decoded`"""
        self.figures: dict[str, int] = {}
        self.proven = False
        """an iteration has gone by in which no image was lost"""

    def submit(self, branches: FinishedBranches, prompts: Sequence[Prompt]) -> None:
        """Branches whose latents are not written to before `collect`; `prompts` are those of the trunks."""
        ready = torch.cuda.current_stream(self.decoder.device).record_event() if self.beside else None
        images = self.decoding.submit(self._decode, branches.latents, ready)
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

    def settle_lost(self, ranks: Ranks) -> None:
        """Counts the lost images of all ranks since the last call, as `figures` of an iteration.

        Raises:
            Halted: on all ranks, where an image is lost before an iteration went by without, or all of them are.
        """
        counts, self.lost = torch.stack(self.lost).sum(0), []
        self.figures = check_lost(ranks.gather(counts[None], 0), "of this iteration", not self.proven)
        self.proven = self.proven or not self.figures

    def _decode(self, latents: Tensor, ready: torch.cuda.Event | None) -> Decoded:
        """Keeps the latents until the last image has arrived on the host, so that their memory is not used again."""
        if ready is not None:
            ready.wait()  # before the clock starts: the stream's time until then belongs to the sampler
        with self.clock("decode"):
            decoded = decode_branches(self.decoder, latents, self.rows)
        self.lost.append(decoded.counts())
        return decoded

    def _score(self, images: Future, prompts: Sequence[Prompt]) -> Tensor:
        decoded = images.result()
        with self.clock("reward"):
            return self.reward(decoded.images, prompts).masked_fill(decoded.lost, torch.nan)


def collect_rewards(scores: ScoreQueue, panel: Panel, ranks: Ranks, shape: Sequence[int]) -> Tensor:
    """(V, M, S, R of all ranks, K) fp32 rewards of the branches submitted since; NaN where a scorer has no opinion.

    Args:
        shape: V, S, R of this rank, K.
    Raises:
        BadInput: on all ranks, where a scorer failed on one of them, or has no opinion at all.
        Halted: on all ranks, where the model computes NaN from the start, or nothing else.
    """
    tails, forks, _, siblings = shape
    own = ranks.agree(scores.collect)
    rewards = ranks.gather(own.view(len(own), tails, forks, -1, siblings), dim=3)
    scores.settle_lost(ranks)
    panel.check_opinions(rewards)
    return rewards.transpose(0, 1)
