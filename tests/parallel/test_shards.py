"""Networks in shares: what is refused, what is planned, what is saved."""

import json
from dataclasses import replace

import pytest
import tiny_pipelines
import torch
import torch.distributed as dist
from long import mostly_long
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from tempflow.common.errors import BadInput
from tempflow.common.tensors import gather, whole
from tempflow.forecast.memory import plan_memory
from tempflow.forecast.words import Forecast
from tempflow.method import read_method
from tempflow.models.load import load_policy, load_skeleton
from tempflow.parallel import ranks as processes
from tempflow.parallel.ranks import Ranks
from tempflow.parallel.shards import like, make_shards, put
from tempflow.run.spreading import settle_copy
from tempflow.settings.checks import shard_count
from tempflow.settings.reading import load
from tempflow.train import main

SHARED = ("digits", "parallel.shard=full", "model.train=full", "tails.rows=6")


def forecast(*arguments, ranks=8):
    config = load([*SHARED, *arguments])
    skeleton = load_skeleton(config.model, config.sample)
    method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
    return Forecast(config, skeleton, method, schedule, ranks)


@pytest.mark.parametrize(("field", "value", "more"), [
    ("learn.optimizer", "adamw8bit", []), ("learn.compile", "true", []), ("explore.draw", "prompt", []),
    ("tails.fp8", "true", ["parallel.merged=sharded"]), ("tails.level", "compile", ["parallel.merged=sharded"]),
    ("tails.rows", "auto", ["tails.merged=false"]), ("parallel.offload", "true", ["parallel.shard=none"]),
])  # fmt: skip
def test_what_does_not_go_with_shares_is_refused(field, value, more):
    with pytest.raises(BadInput) as refusal:
        settle_copy(forecast(*more, f"{field}={value}"), float("inf"))
    assert refusal.value.field == field


def test_nodes_have_to_fit(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    hybrid = load(["digits", "parallel.shard=hybrid"]).parallel
    assert shard_count(hybrid, 16) == 8 and shard_count(replace(hybrid, per_node=4), 16) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shard_count(hybrid, 16) == 2
    with pytest.raises(BadInput, match=r"parallel\.per_node=3"):
        shard_count(replace(hybrid, per_node=3), 16)


def plan(found):
    return plan_memory(found.config, found.skeleton, found.cost(), found.ranks)


def test_a_plan_counts_shares():
    """An eighth of weights, average, moments and gradients; a copy of everything, whole or in shares; two blocks."""
    alone = plan(forecast("parallel.shard=none", "model.dtype=bf16"))
    eight = plan(forecast("parallel.merged=sharded", "model.dtype=bf16"))
    whole_copy = plan(forecast("parallel.merged=whole", "model.dtype=bf16"))
    for name in ("weights", "moving average", "optimizer state"):
        assert eight.stays[name] == pytest.approx(alone.stays[name] / 8, abs=1), name
    assert eight.phases["learning"]["gradients"] == pytest.approx(alone.phases["learning"]["gradients"] / 8, abs=1)
    parameters = alone.stays["weights"] // 4
    assert whole_copy.stays["merged copy"] == 2 * parameters == pytest.approx(8 * eight.stays["merged copy"], abs=8)
    assert 0 < eight.phases["tails"]["gathered blocks"] < 2 * parameters
    assert "gathered blocks" not in whole_copy.phases["tails"] and "averaging" not in eight.phases["learning"]
    away = plan(forecast("parallel.merged=sharded", "model.dtype=bf16", "parallel.offload=true"))
    assert sum(away.stays[name] for name in ("weights", "merged copy", "moving average", "optimizer state")) == 0


def test_the_plan_decides_where_the_copy_lies():
    found = forecast("model.dtype=bf16")
    least = plan(replace(found, config=settle_copy(found, 0.0))).total
    assert settle_copy(found, 0.0).parallel.merged == "sharded" and settle_copy(found, 0.0).tails.level == "eager"
    assert settle_copy(found, float("inf")).parallel.merged == "whole"
    assert plan(replace(found, config=settle_copy(found, float("inf")))).total > least


def test_a_plan_for_more_processes_than_there_are(capsys):
    assert main([*SHARED, "learn.rows=2", "run.plan_only=true", "run.device=cpu", "parallel.ranks=4"]) == 0
    printed = capsys.readouterr().err
    assert "on 4 x cpu" in printed and "gathered blocks" in printed


@pytest.fixture
def one_process():
    yield processes.start("cpu")
    processes.stop()


def test_full_tensors_go_into_shares_and_back(one_process):
    shards = make_shards(one_process, 1, False, torch.float32, None)
    module = torch.nn.Linear(3, 5)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    shards.apply(module)
    parameters = dict(module.named_parameters())
    assert all(hasattr(value, "full_tensor") for value in parameters.values())
    assert all(torch.equal(value, before[name]) for name, value in gather(parameters).items())
    put(module.weight, 2 * before["weight"])
    assert torch.equal(whole(module.weight.detach()), 2 * before["weight"])
    assert torch.equal(whole(like(module.bias, before["bias"])), before["bias"])
    assert like(module.bias, torch.tensor(7.0)) == 7, "a step count is no share"
    assert gather(parameters, keep=False) == {}


@pytest.fixture
def second_of_four():
    """Without the other three: what this one sends comes to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield Ranks(1, 4, torch.device("cpu"), patience=60.0)
    processes.stop()


def test_blocks_are_gathered_within_a_node(second_of_four):
    mesh = make_shards(second_of_four, 2, False, torch.float32, None).mesh
    groups = {name: dist.get_process_group_ranks(mesh.get_group(name)) for name in ("shard", "replicate")}
    assert groups == {"shard": [0, 1], "replicate": [1, 3]}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", mostly_long(["flux", "qwen_image"], 2))
def test_families_compute_and_save_the_same_in_shares(tmp_path, cpu, one_process, name, train):
    """Velocity, reference, merged copy and files in bf16, on one process."""
    folder = tiny_pipelines.save(name, tmp_path / name)
    model = tiny_pipelines.model_config(folder, name, train=train, dtype="bf16")
    sample = tiny_pipelines.sample_config(name, None, tiny_pipelines.SIZE)
    found = []
    for copy in (None, "whole", "sharded"):
        spread = copy and make_shards(one_process, 1, False, torch.bfloat16, copy)
        torch.manual_seed(3)
        policy = load_policy(model, sample, cpu, spread=spread)
        latents, sigma = torch.randn(2, *policy.latent_shape), torch.full((2,), 0.5)
        texts = policy.encode([*tiny_pipelines.TEXTS[:1]] * 2)
        with torch.no_grad(), policy.reference():
            reference = policy.velocity(latents, sigma, texts)
        policy.velocity(latents, sigma, texts).square().mean().backward()
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(parameter.grad, alpha=0.1) if parameter.grad is not None else None
        policy.refresh_merged()
        with torch.no_grad(), policy.merged():
            merged = policy.velocity(latents, sigma, texts)
        policy.save(tmp_path / str(copy))
        found.append((reference, merged, policy.velocity(latents, sigma, texts).detach()))
    for other in found[1:]:
        for expected, value in zip(found[0], other, strict=True):
            assert (value - expected).abs().max() < 0.02 * expected.abs().max()
    files = [sorted((tmp_path / copy).rglob("*.safetensors")) for copy in ("None", "whole", "sharded")]
    tensors = [load_file(each[0]) for each in files]
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.allclose(value, tensors[0][key], atol=2e-3) for key, value in other.items())
    if train == "full":
        configs = [
            json.loads((tmp_path / copy / "transformer" / "config.json").read_text()) for copy in ("None", "whole")
        ]
        assert configs[0]["_class_name"] == configs[1]["_class_name"]
