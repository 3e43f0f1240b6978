"""Compiled decoders are compiled once, whatever is left over of a chunk, and give the images of plain ones."""

import pytest
import torch
from torch import nn

from tempflow.credit.decoding import FullCalls, decode_branches, even_rows
from tempflow.explore.rollout import FinishedBranches
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
