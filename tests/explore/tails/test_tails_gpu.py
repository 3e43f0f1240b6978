"""Tails on a real GPU: captured graphs against plain calls, without a host synchronisation, beside a decoder."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from rollout_cases import at_their_places, explored, forked

from tempflow.common.capture import CudaGraphs
from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.rollout import finish_branches
from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.chunks import choose_rows, free_memory, measure
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.levels import make_engines
from tempflow.explore.tails.recorded import BufferStore, Direct, StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver
from tempflow.models.load import load_policy
from tempflow.models.network.float8 import Float8Linear, to_float8
from tempflow.policy import Conditioning
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer
from tempflow.settings.fields import ModelConfig, SampleConfig, TailConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
TEXTS = ("a two at the top left", "three fours", "a one above a nine")
DEVICE = torch.device("cuda", 0)
SOLVERS = (EXACT, TailSolver("dpmpp_2m", 2), TailSolver("adams_2"))


@pytest.fixture
def policy(disturb):
    torch.manual_seed(0)
    policy = load_policy(ModelConfig(text_tokens=16), SampleConfig(), DEVICE)
    disturb(policy.trainable(), 0.05)
    return policy


@pytest.fixture
def rollout(policy):
    """Branches of three windows of two steps."""
    schedule, plan, _ = forked(forks=[1, 4, 7], window=2, siblings=4)
    return explored(policy, schedule, plan, 3, TEXTS)


def images(engine, rollout, schedule):
    return at_their_places([engine], rollout, schedule)


def graphed(policy, rows=16, solver=EXACT, numerics=nullcontext):
    return StaticEngine(BufferStore(policy, rows, CudaGraphs(DEVICE), numerics), solver)


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", SOLVERS, ids=[solver.describe() for solver in SOLVERS])
def test_graphs_equal_plain_calls(policy, rollout, schedule, solver):
    """Chunks that straddle forks and a short last one; plain calls of the same shapes to rounding."""
    found = images(graphed(policy, 16, solver), rollout, schedule)
    direct = images(StaticEngine(BufferStore(policy, 16, Direct(), nullcontext), solver), rollout, schedule)
    assert (found - direct).abs().max() < 1e-5
    assert (found - images(EagerEngine(policy, 16, solver), rollout, schedule)).abs().max() < 2e-2
    assert found.std() > 0.3


def test_one_graph_serves_every_step_and_both_schedules(policy, schedule):
    engine, conditioning = graphed(policy), policy.encode(TEXTS)
    other = build_schedule(policy.sigmas(25), "flow_sde", 0.7)
    for steps, first in ((schedule, 0), (other, 7), (schedule, 8)):
        latents = torch.randn(3, *policy.latent_shape, device=DEVICE)
        expected = latents.clone()
        engine.finish(latents, [first] * 3, conditioning, steps)
        EagerEngine(policy, 16).finish(expected, [first] * 3, conditioning, steps)
        assert (latents - expected).abs().max() < 2e-2
    assert len(engine.store.known) == 1


def test_tails_wait_for_nothing(policy, rollout, schedule):
    """From the first step of the first chunk to the last of the last, once recorded."""
    engine = graphed(policy)
    first = images(engine, rollout, schedule)
    conditioning, latents = policy.encode(TEXTS), torch.randn(3, *policy.latent_shape, device=DEVICE)
    with no_synchronisation():
        engine.finish(latents, [2, 2, 4], conditioning, schedule)
        again = list(finish_branches([engine], rollout, schedule))
    places = torch.cat([chunk.places for chunk in again])
    assert torch.equal(torch.cat([chunk.latents for chunk in again]), first.flatten(0, 3)[places.to(DEVICE)])


def test_graphs_see_refreshed_and_trained_weights(policy, rollout, schedule, disturb):
    merged, own = graphed(policy, numerics=policy.merged), graphed(policy)
    stale = images(merged, rollout, schedule)
    images(own, rollout, schedule)
    disturb(policy.trainable(), 0.05)
    assert torch.equal(images(merged, rollout, schedule), stale)
    policy.refresh_merged()
    expected = images(EagerEngine(policy, 16), rollout, schedule)
    for engine in (merged, own):
        assert (images(engine, rollout, schedule) - expected).abs().max() < 2e-2
    assert (expected - stale).abs().max() > 5e-2


def test_graphs_share_a_pool_without_harm(policy, schedule):
    """Two shapes of conditioning, two graphs, used in turns."""
    engine, texts = graphed(policy, 4), policy.encode(TEXTS)
    short = Conditioning({**texts.tensors, "embeds": texts.tensors["embeds"][:, :9].contiguous()})
    noise = torch.randn(3, *policy.latent_shape, device=DEVICE)
    seen = {}
    for _ in range(3):
        for name, conditioning in (("whole", texts), ("short", short)):
            latents = noise.clone()
            engine.finish(latents, [4, 4, 4], conditioning, schedule)
            assert torch.equal(seen.setdefault(name, latents), latents)
    assert len(engine.store.known) == 2
    expected = noise.clone()
    EagerEngine(policy, 4).finish(expected, [4, 4, 4], short, schedule)
    assert (seen["short"] - expected).abs().max() < 2e-2


def test_decoding_beside_graphs_gives_the_same_rewards(policy, rollout, schedule):
    """The queue reads latents of one chunk while graphs make the next."""

    def brightness(images, prompts):
        return images.float().mean((1, 2, 3))

    engine, rewards = graphed(policy, 8), []
    for overlap in (True, False):
        scores = ScoreQueue(policy, Scorer("reward.name", "mine", brightness, 8), 8, PhaseClock(DEVICE), overlap)
        for chunk in finish_branches([engine], rollout, schedule):
            scores.submit(chunk, [Prompt("x")] * 6)
        rewards.append(scores.collect())
        assert set(scores.clock.read()) == {"decode", "reward"}
    assert (rewards[0] - rewards[1]).abs().max() < 0.5 and rewards[0].std() > 0.5


@pytest.mark.parametrize("level", ["eager", "graph", "compile", "compiled_graph"])
def test_every_level_works(policy, rollout, schedule, level):
    engines = make_engines(policy, TailConfig(level=level), 16, schedule, TEXTS[0])
    expected = images(EagerEngine(policy, 16), rollout, schedule)
    assert engines.level == level
    for engine in (*engines.explore, engines.evaluate):
        assert (images(engine, rollout, schedule) - expected).abs().max() < 2e-2


def test_chunks_are_measured(policy):
    probes = measure(policy, policy.merged, 64, TEXTS[0])
    assert [probe.rows for probe in probes] == [4, 16, 64]
    assert 0 < probes[0].peak < probes[2].peak < free_memory(DEVICE)
    assert 4 <= choose_rows([5] * 64, probes, free_memory(DEVICE), padded=True).rows <= 64


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit floating point"
)
def test_float8_layers_multiply_what_they_rounded_also_in_graphs():
    torch.manual_seed(0)
    weight, inputs = torch.randn(256, 512, device=DEVICE), torch.randn(3, 33, 512, device=DEVICE)
    layer, output = Float8Linear(weight, torch.randn(256, device=DEVICE)), torch.zeros(3, 33, 256, device=DEVICE)
    replay = CudaGraphs(DEVICE).record(lambda: output.copy_(layer(inputs)))
    for scale in (1.0, 3.0):
        layer.refresh(weight * scale)
        replay()
        (x, x_scale), (w, w_scale) = to_float8(inputs.view(99, 512)), to_float8(weight * scale)
        oracle = (x.double() * x_scale) @ (w.double() * w_scale).t() + layer.bias.double()
        assert (output.double().view(99, 256) - oracle).abs().max() < 2e-2 * oracle.abs().max()
