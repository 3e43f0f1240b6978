"""The memory plan: activations against measured ones on every family, and the budgets of published models."""

import json

import published_models
import pytest
import tiny_pipelines
import torch

from tempflow.explore.plan import BranchPlan
from tempflow.forecast.memory import MemoryPlan, plan_memory
from tempflow.models.load import load_policy, load_skeleton
from tempflow.models.without_weights.peaks import DryModel
from tempflow.settings.fields import ModelConfig, SampleConfig
from tempflow.settings.reading import load

GIB = 2**30
TOLERANCE = 0.15


def saved_bytes(policy, rows: int, text: str) -> int:
    """What a forward pass really keeps for the backward pass, parameters and texts left out."""
    conditioning = policy.encode([text] * rows)
    module = policy.network.module
    held = [*module.parameters(), *module.buffers(), *conditioning.tensors.values()]
    known, kept = {tensor.untyped_storage()._cdata for tensor in held}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.velocity(torch.randn(rows, *policy.latent_shape), torch.full((rows,), 0.5), conditioning)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", list(tiny_pipelines.BUILDERS))
def test_activations_are_those_measured(tmp_path, cpu, name, train):
    model = ModelConfig(path=str(tiny_pipelines.save(name, tmp_path / name)), train=train,
                        text_tokens=tiny_pipelines.TEXT_TOKENS[name])  # fmt: skip
    sample = SampleConfig(height=32, width=32)
    policy = load_policy(model, sample, cpu, keep_reference=False)
    measured = saved_bytes(policy, 3, tiny_pipelines.TEXTS[0])
    planned = DryModel(load_skeleton(model, sample), model).learning(3, checkpointing=False)
    assert planned.kept == pytest.approx(measured, rel=TOLERANCE)
    assert planned.peak >= planned.kept


def test_activations_grow_with_rows_and_shrink_with_checkpointing(tmp_path):
    model = ModelConfig(path=str(tiny_pipelines.save("flux", tmp_path / "flux")), text_tokens=32, dtype="bf16")
    dry = DryModel(load_skeleton(model, SampleConfig(height=64, width=64)), model)
    two, four = dry.learning(2, False), dry.learning(4, False)
    assert four.kept == pytest.approx(2 * two.kept, rel=0.1)
    checkpointed = dry.learning(4, True)
    assert checkpointed.kept < 0.2 * four.kept and checkpointed.peak < four.peak
    assert dry.learning(4, False) == four
    assert dry.sampling(4).peak < 0.6 * four.peak
    assert dry.decoding(4).peak == pytest.approx(2 * dry.decoding(2).peak, rel=0.05)


def planned(tmp_path, name: str, *overrides: str) -> MemoryPlan:
    folder = published_models.write(name, tmp_path / name)
    config = load([*overrides[:1], f"model.path={folder}", *overrides[1:]])
    plan = BranchPlan.parse(config.explore.forks, config.sample.steps, config.explore.siblings)
    return plan_memory(config, load_skeleton(config.model, config.sample), plan)


def test_adapters_of_sd35_medium_fit_24_gb(tmp_path):
    """512 pixels, rank 32, N = 4, K = 6."""
    config = load(["sd35_medium_24gb"])
    branch = config.branch
    assert (config.model.lora_rank, explore.noises, explore.siblings, config.sample.height) == (32, 4, 6, 512)
    plan = planned(tmp_path, "sd35_medium", "sd35_medium_24gb")
    assert plan.total < 22 * GIB
    assert plan.stays["weights"] == pytest.approx(2 * 2.243e9 + 4 * 18.8e6, rel=0.01)
    assert plan.stays["captured tails"] > 2 * GIB and plan.phases["tails"]["tail chunk"] == 0, "graphs keep it"
    assert plan.phases["encoding"]["text encoders"] == pytest.approx(2 * (4.762e9 + 0.695e9 + 0.123e9), rel=0.01)
    assert plan.compared["a learning batch with gradient checkpointing"] < plan.phases["learning"]["batch"] / 5


def test_all_of_sd35_medium_fits_48_gb_with_8_bit_adamw(tmp_path):
    plan = planned(tmp_path, "sd35_medium", "sd35_medium_full_48gb")
    assert plan.total < 44 * GIB
    assert plan.stays["optimizer state"] == pytest.approx((2 + 8 / 256) * 2.243e9, rel=0.01)
    assert plan.stays["moving average"] == plan.phases["learning"]["gradients"] == plan.stays["weights"]
    assert plan.stays["captured tails"] == 0 < plan.phases["tails"]["tail chunk"], "graphs would keep it"
    assert "optimizer state 4.24 GiB" in plan.describe() or "optimizer state 4.25 GiB" in plan.describe()


def test_plan_only_needs_no_weights_and_no_prompts(tmp_path, capsys):
    """A folder of configurations is enough."""
    from tempflow.train import main

    folder = tiny_pipelines.save("sd3", tmp_path / "sd3")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    code = main(["digits", f"model.path={folder}", "model.text_tokens=32", "prompts.train=absent", "reward.name=absent",
                 "objective.kl=0.1", "run.plan_only=true", f"run.dir={tmp_path / 'run'}"])  # fmt: skip
    printed = capsys.readouterr().err
    assert code == 0 and not (tmp_path / "run").exists()
    assert "12 prompts x 2 seeds = 24 trunks" in printed and "85 optimizer steps, 61,200 images" in printed
    assert "memory per process, estimated" in printed and "gradient checkpointing" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_a_gpu(tmp_path, checkpointing):
    """A model wide enough to be more than the allocator's rounding, in bf16 autocast."""
    pipeline = tiny_pipelines.sd3()
    config = dict(pipeline.transformer.config) | {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 64,
                                                  "caption_projection_dim": 512, "pos_embed_max_size": 64}  # fmt: skip
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config))
    pipeline.save_pretrained(tmp_path / "sd3")
    model = ModelConfig(path=str(tmp_path / "sd3"), text_tokens=32, dtype="bf16", gradient_checkpointing=checkpointing)
    sample, device, rows = SampleConfig(height=64, width=64), torch.device("cuda"), 16
    expected = DryModel(load_skeleton(model, sample), model).learning(rows, checkpointing).peak
    policy = load_policy(model, sample, device, keep_reference=False)
    conditioning = policy.encode(["three fours"] * rows)
    latents, sigma = torch.randn(rows, *policy.latent_shape, device=device), torch.full((rows,), 0.5, device=device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        policy.velocity(latents, sigma, conditioning).sum().backward()
    measured = torch.cuda.max_memory_allocated() - before
    print(json.dumps({"measured": measured, "expected": expected}))
    assert expected == pytest.approx(measured, rel=0.3)
