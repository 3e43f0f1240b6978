"""Compiled decoders are compiled once, whatever is left over of a chunk, and give the images of plain ones."""

import pytest
import torch
from torch import nn

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import Halted
from tempflow.credit.decoding import FullCalls, check_lost, decode_branches, even_rows
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.rollout import FinishedBranches
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer
from tempflow.run.assembly import set_up
from tempflow.settings.reading import load

SMALL = ["digits", "explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]",
         "sample.steps=5", "learn.rows=2", "prompts.test=null", "learn.iterations=2", "run.trackers=[]",
         "reward.rows=5", "tails.rows=13", "tails.compile_vae=true"]  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """How many inputs each graph has that a module's `compile` makes; the graphs run as they are."""
    seen, plain = [], nn.Module.compile

    def keep(graph, inputs):
        seen.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: plain(module, backend=keep, **options))
    yield seen
    torch._dynamo.reset()


def test_a_short_last_chunk_compiles_nothing_again(graphs, tmp_path):
    """Chunks of 13 and a last one of 3 in calls of at most 5."""
    shown = []

    def look(images, prompts):
        shown.append(images)
        return torch.zeros(len(images))

    panel = Panel({"look": Scorer("reward.name", "look", look, 100)}, torch.ones(1))
    config = load([*SMALL, f"run.dir={tmp_path / 'run'}"])
    trainer, _, _ = set_up(config, panels=(panel, Panel({}, torch.ones(0))))
    latents = torch.randn(16, *trainer.policy.latent_shape)
    for part in (slice(0, 13), slice(13, 16)):
        places = torch.arange(16)[part]
        trainer.scores.submit(FinishedBranches(latents[part], [0] * len(places), places), [Prompt("a one")])
    trainer.scores.collect()
    assert len(graphs) == 1
    trainer.policy.pipeline.vae.decoder._compiled_call_impl = None
    assert (torch.cat(shown).int() - trainer.policy.decode(latents).int()).abs().max() <= 1


def test_evaluation_shares_the_compiled_shape(graphs, tmp_path):
    config = load([*SMALL, f"run.dir={tmp_path / 'run'}", "prompts.test=tempflow:digits/prompts/test.jsonl",
                   "eval.prompts=7"])  # fmt: skip
    trainer, journal, _ = set_up(config)
    journal.evaluator.evaluate()
    places = torch.arange(3)
    trainer.scores.submit(FinishedBranches(torch.randn(3, *trainer.policy.latent_shape), [0] * 3, places),
                          trainer.feed.at(0)[0])  # fmt: skip
    trainer.scores.collect()
    assert len(graphs) == 1


def test_calls_are_filled_up_and_cut(toy):
    calls, plain = [], toy.decode

    def decode(latents):
        calls.append(len(latents))
        return plain(latents)

    toy.decode = decode
    latents = torch.randn(2, 4, 2, 3)
    images = decode_branches(FullCalls(toy, 3), latents, 3).images
    assert calls == [3, 3, 3] and images.shape == (2, 4, 3, 2, 3)
    assert torch.equal(images.flatten(0, 1), plain(latents.flatten(0, 1)))
    decode_branches(toy, latents, 3)
    assert calls[3:] == [3, 3, 2], "what is not compiled is not filled up"


@pytest.mark.parametrize(("total", "most", "rows"), [(24, 16, 12), (48, 16, 16), (7, 100, 7), (13, 5, 5), (1, 1, 1)])
def test_even_calls(total, most, rows):
    assert even_rows(total, most) == rows


@pytest.mark.parametrize(
    ("counts", "strict", "found"),
    [
        ([[0, 0, 9], [0, 0, 9]], True, {}),
        ([[0, 0, 9], [1, 2, 9]], False, {"nonfinite_latents": 1, "nonfinite_images": 2}),
        ([[0, 0, 9], [1, 0, 9]], True, "model.dtype"),
        ([[0, 1, 9], [0, 0, 9]], True, "model.vae_dtype"),
        ([[9, 0, 9], [4, 5, 9]], False, "model.dtype"),
        ([[0, 9, 9]], False, "model.vae_dtype"),
    ],
)
def test_lost_images_are_counted_over_all_processes_or_end_the_run(counts, strict, found):
    """The part that is to blame: the transformer where latents are lost, else the decoder."""
    if isinstance(found, dict):
        assert check_lost(torch.tensor(counts), "now", strict) == found
        return
    with pytest.raises(Halted) as caught:
        check_lost(torch.tensor(counts), "now", strict)
    assert caught.value.field == found and ("transformer" in caught.value.hint) == (found == "model.dtype")


def broken(toy, bright):
    """A decoder that makes no numbers of latents that begin with more than `bright`."""
    plain = toy.decode

    def decode(latents):
        toy.finite = latents[:, 0, 0] <= bright
        return plain(latents)

    toy.decode = decode
    return toy


@pytest.mark.parametrize("filled", [False, True])
def test_lost_images_are_told_from_black_ones(toy, filled):
    latents = torch.zeros(2, 4, 2, 3)
    latents[0, 1, 0, 0], latents[1, 2, 1, 1] = 5.0, float("nan")
    decoder = broken(toy, 3.0)
    decoded = decode_branches(FullCalls(decoder, 3) if filled else decoder, latents, 3)
    assert decoded.lost_images.nonzero().tolist() == [[0, 1]] and decoded.lost_latents.nonzero().tolist() == [[1, 2]]
    assert decoded.counts().tolist() == [1, 1, 8]


@pytest.mark.parametrize("parallel", [0, 3])
def test_a_lost_image_has_no_reward(toy, parallel):
    """Whatever a scorer says of its black picture, alone or in a panel, in turn or beside the sampler."""
    bright = Scorer("reward.name", "bright", lambda images, prompts: images[:, 0, 0, 0].float(), 2, parallel)
    scores = ScoreQueue(broken(toy, 3.0), Panel({"a": bright}, torch.ones(1)), 2, PhaseClock(toy.device), True)
    for lost, places in ((), ([0, 1])), ((1, 3), [3, 1, 0, 2]):
        latents = torch.zeros(len(places), 2, 3)
        for row in lost:
            latents[row] = float("nan") if row == 1 else 9.0
        scores.submit(FinishedBranches(latents, [0] * len(places), torch.tensor(places)), [Prompt("a")])
        rewards = scores.collect()[0]
        scores.settle_lost(Ranks(0, 1, toy.device))
        assert sorted(rewards.isnan().nonzero().flatten().tolist()) == sorted(places[row] for row in lost)
    assert scores.figures == {"nonfinite_latents": 1, "nonfinite_images": 1}


def test_a_model_that_loses_images_from_the_start_ends_the_run(toy):
    bright = Scorer("reward.name", "bright", lambda images, prompts: images[:, 0, 0, 0].float(), 2)
    scores = ScoreQueue(broken(toy, 3.0), bright, 2, PhaseClock(toy.device), True)
    latents = torch.zeros(2, 2, 3)
    latents[0] = 9.0
    scores.submit(FinishedBranches(latents, [0, 0], torch.tensor([0, 1])), [Prompt("a")])
    scores.collect()
    with pytest.raises(Halted, match=r"model\.vae_dtype=.*1 of 2 images"):
        scores.settle_lost(Ranks(0, 1, toy.device))
