"""What waits for what on a GPU: streams and events of the score queue, on a GPU that is only arithmetic.

Each stream is the time at which it becomes free; a kernel takes it from there, an event is that time. The host waits
for nothing, so it runs as far ahead as it can.
"""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.rollout import FinishedBranches
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer

TAILS, DECODE, REWARD = 1.0, 0.125, 0.25
"""seconds of a chunk's kernels"""
CHUNKS = 3


class Event:
    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self, stream):
        self.time = stream.free

    def wait(self, stream=None):
        stream = stream or torch.cuda.current_stream()
        stream.free = max(stream.free, self.time)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1000


class Stream:
    def __init__(self, device=None):
        self.free = 0.0

    def record_event(self):
        event = Event()
        event.record(self)
        return event


@pytest.fixture
def gpu(monkeypatch):
    """`launch(kind, seconds)` on the current stream; `kernels` are those launched: kind, stream, start, end."""
    first, here, kernels = Stream(), threading.local(), []

    def current_stream(device=None):
        return getattr(here, "stream", first)

    def set_stream(stream):
        here.stream = stream

    @contextmanager
    def within(stream):
        before = current_stream()
        set_stream(stream)
        yield
        set_stream(before)

    def launch(kind, seconds):
        stream = current_stream()
        kernels.append(SimpleNamespace(kind=kind, stream=stream, start=stream.free, end=stream.free + seconds))
        stream.free += seconds

    fakes = {"Stream": Stream, "Event": Event, "current_stream": current_stream, "set_stream": set_stream,
             "stream": within}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return SimpleNamespace(launch=launch, kernels=kernels, first=first)


class Decoder:
    device, latent_shape, image_shape = torch.device("cuda"), (2,), (3, 1, 1)

    def __init__(self, gpu):
        self.gpu, self.calls, self.second = gpu, 0, threading.Event()

    def decode(self, latents):
        self.calls += 1
        self.gpu.launch("decode", DECODE)
        if self.calls == 2:
            self.second.set()
        return torch.zeros(len(latents), 3, 1, 1, dtype=torch.uint8)


def score(gpu, parallel=0):
    """Three chunks: the kernels by kind, and the seconds by phase. Judges wait until the second chunk is decoded."""
    decoder = Decoder(gpu)

    def judge(images, prompts):
        assert decoder.second.wait(10)
        gpu.launch("reward", REWARD)
        return torch.zeros(len(images))

    clock = PhaseClock(decoder.device)
    scores = ScoreQueue(decoder, Scorer("reward.name", "mine", judge, 2, parallel), 2, clock, overlap=True)
    for chunk in range(CHUNKS):
        gpu.launch("tails", TAILS)
        places = torch.arange(2) + 2 * chunk
        scores.submit(FinishedBranches(torch.zeros(2, 2), [0, 0], places), [Prompt("a")])
    scores.collect()
    return {kind: [kernel for kernel in gpu.kernels if kernel.kind == kind] for kind in
            ("tails", "decode", "reward")}, clock.read()  # fmt: skip


def test_seconds_of_decoding_and_judging_hold_nothing_of_the_tails(gpu):
    _, seconds = score(gpu)
    assert seconds == pytest.approx({"decode": CHUNKS * DECODE, "reward": CHUNKS * REWARD})


def test_a_chunk_is_decoded_once_its_tails_have_ended(gpu):
    kernels, _ = score(gpu)
    for tails, decode in zip(kernels["tails"], kernels["decode"], strict=True):
        assert decode.start >= tails.end and decode.stream is not gpu.first


@pytest.mark.parametrize("parallel", [0, 4])
def test_a_judge_waits_neither_for_the_sampler_nor_for_the_next_chunks_decoding(gpu, parallel):
    """The second chunk is in the decoder's queue already when the first is judged."""
    kernels, _ = score(gpu, parallel)
    streams = {kernel.stream for kernel in kernels["reward"]}
    assert len(streams) == 1 and not streams & {gpu.first, kernels["decode"][0].stream}
    assert kernels["reward"][0].start < kernels["tails"][1].end
