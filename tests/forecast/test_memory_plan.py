"""The memory plan: activations against measured ones on every family, and the budgets of published models."""

import json
import math

import published_models
import pytest
import tiny_pipelines
import torch
from saved_bytes import saved_bytes

from tempflow.forecast.memory import BUCKET, CUDA, MemoryPlan, plan_memory
from tempflow.forecast.words import Forecast
from tempflow.method import read_method
from tempflow.models.load import load_policy, load_skeleton
from tempflow.models.without_weights.peaks import DryModel
from tempflow.settings.fields import ModelConfig, SampleConfig
from tempflow.settings.reading import load

GIB = 2**30
TOLERANCE = 0.15


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


def planned(folder, *arguments: str, ranks: int = 1) -> MemoryPlan:
    """The plan of a command line, with its model in `folder`."""
    config = load([*arguments, f"model.path={folder}"])
    skeleton = load_skeleton(config.model, config.sample)
    method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
    return plan_memory(config, skeleton, Forecast(config, skeleton, method, schedule, ranks).cost(), ranks)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_pipelines.save("sd3", tmp_path_factory.mktemp("planned") / "sd3")


SETTINGS = ("digits", "model.text_tokens=32", "sample.height=32", "sample.width=32", "explore.prompts=4",
            "explore.noises=2", "explore.siblings=3", "explore.forks=[0,2]", "learn.rows=2", "tails.rows=6",
            "tails.level=eager")  # fmt: skip


def test_parts_that_stay_are_counted_exactly(sd3, cpu):
    """Adapters in fp32 beside frozen weights in bf16; a merged copy of the adapted layers alone."""
    plan, plain = planned(sd3, *SETTINGS, "model.dtype=bf16"), planned(sd3, *SETTINGS, "tails.merged=false")
    model = ModelConfig(path=str(sd3), text_tokens=32, dtype="bf16")
    policy = load_policy(model, SampleConfig(height=32, width=32), cpu, keep_reference=False)
    adapters = sum(4 * value.numel() for value in policy.trainable().values())
    transformer = sum(value.nbytes for value in policy.network.module.parameters())
    policy.refresh_merged()
    with policy.merged():
        pass
    assert plan.stays["weights"] == transformer and plan.stays["moving average"] == adapters
    assert plan.stays["optimizer state"] == pytest.approx(2 * adapters, rel=0.01)
    assert plan.phases["learning"]["gradients"] == adapters and plan.stays["CUDA"] == CUDA
    assert plan.stays["reference"] == 0 and 0 < plan.stays["merged copy"] < transformer
    assert plain.stays["merged copy"] == 0
    assert plan.total == sum(plan.stays.values()) + max(sum(parts.values()) for parts in plan.phases.values())


def test_states_and_branches_are_shared_by_processes(sd3):
    """4 x 2 trunks, 2 forks, K = 3, two ends a branch: latents and velocities in fp32."""
    one, two = planned(sd3, *SETTINGS), planned(sd3, *SETTINGS, ranks=2)
    config = load([*SETTINGS, f"model.path={sd3}"])
    latent = math.prod(load_skeleton(config.model, config.sample).latent_shape)
    assert one.phases["tails"]["decisions"] == 8 * latent * 16 and two.phases["tails"]["decisions"] == 8 * latent * 8
    assert one.phases["tails"]["branches"] == 4 * latent * 48 * 2 and two.phases["tails"]["branches"] == 4 * latent * 48
    trained = one.stays["moving average"]
    assert two.phases["learning"]["averaging"] == min(BUCKET, trained) and "averaging" not in one.phases["learning"]
    window = planned(sd3, *SETTINGS, "explore.forks=[0]", "explore.window=3", "tails.stride=[1,2]")
    assert window.phases["trunk"]["decisions"] == 8 * latent * (8 + 2 * 24)
    assert window.phases["tails"]["branches"] == 4 * latent * 24 * 3


def test_a_reference_and_a_whole_merged_copy_only_with_full_training(sd3):
    full = planned(sd3, *SETTINGS, "model.train=full", "objective.kl=0.1", "model.dtype=bf16")
    trained = full.stays["moving average"]
    assert full.stays["reference"] == trained // 2 and full.stays["merged copy"] == trained // 2
    assert full.stays["weights"] == trained
    assert planned(sd3, *SETTINGS, "objective.kl=0.1").stays["reference"] == 0


def test_a_learning_batch_is_the_peak_of_its_backward_pass(sd3):
    config = load([*SETTINGS, f"model.path={sd3}"])
    dry = DryModel(load_skeleton(config.model, config.sample), config.model)
    assert planned(sd3, *SETTINGS).phases["learning"]["batch"] == dry.learning(2, False).peak
    assert planned(sd3, *SETTINGS).phases["tails"]["tail chunk"] == dry.sampling(6, merged=True).peak
    most = planned(sd3, *SETTINGS, "tails.rows=1000")
    assert most.phases["tails"]["tail chunk"] == dry.sampling(48, merged=True).peak < dry.sampling(48).peak


def test_chunks_leave_what_a_captured_call_would_take_from_learning():
    """Stand-in numbers: moments of 100; learning 8 + 70 at its peak, tails 8 + 20 beside their call."""
    plan = MemoryPlan(
        stays={"weights": 1000, "optimizer state": 100, "captured tails": 0},
        phases={"tails": {"decisions": 8, "tail chunk": 500, "decoding": 20}, "learning": {"batch": 78}},
        compared={},
    )
    assert (plan.beside_tails(captured=True), plan.beside_tails(captured=False)) == (178, 128)


def test_captured_calls_hold_the_larger_of_tails_and_evaluation(sd3):
    """And evaluation's, captured later, are first made beside them."""
    graphs = [*SETTINGS[:-1], "tails.level=compiled_graph"]
    alone, evaluated = planned(sd3, *graphs, "prompts.test=null"), planned(sd3, *graphs)
    config = load([*SETTINGS, f"model.path={sd3}"])
    dry = DryModel(load_skeleton(config.model, config.sample), config.model)
    assert alone.stays["captured tails"] == dry.sampling(6, merged=True).peak and "evaluation" not in alone.phases
    exact = dry.sampling(6).peak
    assert evaluated.stays["captured tails"] == evaluated.phases["evaluation"]["network call"] == exact


def published(tmp_path, name: str, preset: str) -> MemoryPlan:
    return planned(published_models.write(name, tmp_path / name), preset)


def test_adapters_of_sd35_medium_fit_24_gb(tmp_path):
    """512 pixels, rank 32, N = 4, K = 6."""
    config = load(["sd35_medium_24gb"])
    explore = config.explore
    assert (config.model.lora_rank, explore.noises, explore.siblings, config.sample.height) == (32, 4, 6, 512)
    plan = published(tmp_path, "sd35_medium", "sd35_medium_24gb")
    assert plan.total / GIB == pytest.approx(19.2, abs=0.05), "as in docs/models.md"
    assert plan.stays["weights"] == pytest.approx(2 * 2.243e9 + 4 * 18.8e6, rel=0.01)
    assert plan.stays["captured tails"] > 2 * GIB and plan.phases["tails"]["tail chunk"] == 0, "graphs keep it"
    assert plan.phases["encoding"]["text encoders"] == pytest.approx(2 * (4.762e9 + 0.695e9 + 0.123e9), rel=0.01)
    assert plan.compared["a learning batch with gradient checkpointing"] < plan.phases["learning"]["batch"] / 5


@pytest.mark.long
def test_sd35_medium_without_guidance_fits_24_gb(tmp_path):
    """A velocity costs one network row."""
    plan = published(tmp_path, "sd35_medium", "sd35_medium_no_guidance_24gb")
    assert plan.total / GIB == pytest.approx(19.2, abs=0.05), "as in docs/models.md"
    config = load(["sd35_medium_no_guidance_24gb", f"model.path={tmp_path / 'sd35_medium'}"])
    assert load_skeleton(config.model, config.sample).network_rows == 1


@pytest.mark.long
def test_all_of_sd35_medium_fits_48_gb_with_8_bit_adamw(tmp_path):
    plan = published(tmp_path, "sd35_medium", "sd35_medium_full_48gb")
    assert plan.total / GIB == pytest.approx(40.4, abs=0.05), "as in docs/models.md"
    assert plan.stays["optimizer state"] == pytest.approx((2 + 8 / 256) * 2.243e9, rel=0.01)
    assert plan.stays["moving average"] == plan.phases["learning"]["gradients"] == plan.stays["weights"]
    assert plan.stays["captured tails"] == 0 < plan.phases["tails"]["tail chunk"], "graphs would keep it"
    assert "optimizer state 4.25 GiB" in plan.describe()


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
    assert "12 prompts x 2 noises = 24 trunks" in printed and "85 optimizer steps, 61,200 images" in printed
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
