"""The rollouts benchmark: its baseline learns what ours learns; FLOPs are those torch counts; its sums are right."""

import subprocess
import sys
from dataclasses import replace

import diffusers
import importable
import pytest
import torch
from machine.flops import ROW_COSTS, counted
from rollouts import compare as rollouts
from rollouts import linearity, official, profile_iteration
from rollouts.bench import Bench, bytes_of, forks_to_warm_up, iterate
from rollouts.bench import _reset as timed_reset
from rollouts.figures import figures, network_rows, rank_correlation
from rollouts.report import read, summarise, table, with_rates
from rollouts.results_file import Results, read_rows
from rollouts.set_up_times import kind_of
from rollouts.variants import REFERENCE, VARIANTS, settings_of

from tempflow.models.network.network import TrainedNetwork

SMALL = {"explore.prompts": 2, "explore.noises": 2, "explore.siblings": 3, "sample.steps": 4, "learn.rows": 4,
         "tails.rows": 10, "objective.kl": 0.05}  # fmt: skip
BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Digits in small, with a KL term large enough to show in the gradient."""
    return Bench("digits", torch.device("cpu"), tmp_path_factory.mktemp("bench"), SMALL)


class Keeping:
    """A stepper that keeps the gradient it is given, and moves nothing."""

    def __init__(self, stepper):
        self.stepper, self.seen = stepper, {}

    def update(self, ranks, idle: bool) -> None:
        for name, value in self.stepper.parameters.items():
            self.seen[name], value.grad = value.grad.clone(), None
        self.stepper.idle()

    def __getattr__(self, name: str):
        return getattr(self.stepper, name)


def gradients(case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The rewards of an iteration, and what it hands to its optimizer."""
    keeping = Keeping(case.trainer.stepper)
    measured = iterate(replace(case, trainer=replace(case.trainer, stepper=keeping)), 0)
    return measured.rewards, keeping.seen


def test_the_baseline_has_the_same_rewards_and_gradient(bench):
    """The released algorithm's copies, loops and PIL images against chunks and shared rows: equal up to rounding."""
    ours, released = bench.case(BY_NAME[REFERENCE]), bench.case(BY_NAME["official"])
    (rewards, found), (released_rewards, expected) = gradients(ours), gradients(released)
    assert rewards.shape == (3, 4, 3) and rewards.std() > 0
    assert (rewards - released_rewards).abs().max() < 5e-3  # a pixel may round the other way
    size = torch.cat([value.flatten() for value in expected.values()]).norm()
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    assert size > 1e-4 and difference < 2e-2 * size


def test_the_baseline_learns_the_same_from_the_same_rewards(bench, monkeypatch):
    """With rewards taken from noise identities instead of pixels nothing is left but rounding of the loss."""
    rewards = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(3))
    ours, released = bench.case(BY_NAME[REFERENCE]), bench.case(BY_NAME["official"])
    monkeypatch.setattr(official, "collect", lambda scores: (rewards.transpose(0, 1).flatten(), 0.0))
    scores, given = ours.trainer.scores, rewards.view(1, -1)
    monkeypatch.setattr(scores, "collect", lambda: setattr(scores, "rewards", given) or given)
    (of_ours, found), (of_released, expected) = gradients(ours), gradients(released)
    assert torch.equal(of_ours, rewards) and torch.equal(of_released, rewards)
    size = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 2e-4 * size, name


def test_rank_correlation_is_spearmans():
    exact = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rank_correlation(exact * 7, exact) == pytest.approx(1)
    assert rank_correlation(-exact, exact) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([[2.0, 1.0, 3.0, 4.0]]), exact) == pytest.approx(0.8)
    assert rank_correlation(torch.tensor([[1.0, 1.0, 3.0, 4.0]]), exact) == pytest.approx(0.9487, abs=1e-4)
    halves = torch.stack((exact, -exact)), torch.stack((exact, exact))
    assert rank_correlation(*halves) == pytest.approx(0)


def sd3():
    from rollouts.architectures import SMALL_SD3

    model = diffusers.SD3Transformer2DModel(**SMALL_SD3 | {"num_layers": 3, "dual_attention_layers": (0, 1)})
    inputs = {"hidden_states": torch.zeros(1, 16, 16, 16), "timestep": torch.zeros(1),
              "encoder_hidden_states": torch.zeros(1, 7, 32), "pooled_projections": torch.zeros(1, 16)}  # fmt: skip
    return model, inputs


def flux():
    from rollouts.architectures import SMALL_FLUX

    model = diffusers.FluxTransformer2DModel(**SMALL_FLUX | {"num_layers": 2, "num_single_layers": 3})
    inputs = {"hidden_states": torch.zeros(1, 64, 64), "timestep": torch.zeros(1), "guidance": torch.zeros(1),
              "encoder_hidden_states": torch.zeros(1, 7, 32), "pooled_projections": torch.zeros(1, 16),
              "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(7, 3)}  # fmt: skip
    return model, inputs


@pytest.mark.parametrize("build", [sd3, flux])
def test_flops_of_a_row_are_those_torch_counts(build):
    model, inputs = build()
    cost = ROW_COSTS[type(model).__name__](model.config, 64, 7)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert cost.forward == counted(lambda: model(**inputs))
    assert 0 < cost.attention < cost.linear


def test_network_rows_are_the_calls_that_are_made(bench, monkeypatch):
    """Counted at the network's door: forward rows of trunk, tails, learning and reference."""
    rows, forward = [], TrainedNetwork.forward

    def counting(self, inputs, device):
        rows.append(len(inputs["hidden_states"]))
        return forward(self, inputs, device)

    monkeypatch.setattr(TrainedNetwork, "forward", counting)
    for name in ("official", REFERENCE):
        case = bench.case(BY_NAME[name])
        rows.clear()
        found = network_rows(case, iterate(case, 0))
        assert sum(rows) == found.trunk + found.tails + found.learn + found.reference
        assert found.learn == 3 * 4 * (3 if name == "official" else 1)


def test_settings_add_up_level_by_level():
    last, beside = BY_NAME["+stride 3"], settings_of(BY_NAME["compiled decoder"], True)
    assert settings_of(BY_NAME[REFERENCE], True)["tails.merged"] is False
    assert settings_of(last, True)["tails.fp8"] is True and settings_of(last, True)["model.dtype"] == "bf16"
    assert "tails.fp8" not in settings_of(last, False) and settings_of(last, False)["model.dtype"] == "fp32"
    assert beside["tails.compile_vae"] and beside["reward.overlap"] and "tails.fp8" not in beside
    assert settings_of(BY_NAME["official"], True)["model.dtype"] == "fp32"


def test_a_smoke_run_writes_rows_table_and_picture(tmp_path, capsys):
    assert rollouts.main(["--smoke", "--architecture", "digits", "--minutes", "60", "--out", str(tmp_path),
                          "--variants", f"official,official-tuned,{REFERENCE},+merged,+multistep",
                          "--set", "tails.level=eager"]) == 0  # fmt: skip
    rows = read(tmp_path / "rollouts_digits.jsonl")
    found = summarise(rows)
    assert list(found) == ["official", REFERENCE, "+merged", "+multistep"]
    assert [row["variant"] for row in rows if row["kind"] == "skipped"] == ["official-tuned"]
    assert all({"device", "torch", "commit", "date"} <= set(row) for row in rows)
    assert found["+multistep"].rows["tails"] < found["+merged"].rows["tails"] == found[REFERENCE].rows["tails"]
    for item in found.values():
        assert sum(item.phases.values()) == pytest.approx(item.per_thousand, rel=0.02)
        assert item.rate == pytest.approx(item.rollouts / item.seconds * 3600)
    assert found["+merged"].correlation > 0.9
    printed = capsys.readouterr().out
    assert "not run: `official-tuned`" in printed and "| 1.00 |" in printed and "| approximation |" in printed
    assert (tmp_path / "rollouts_digits.png").stat().st_size > 10_000
    assert all(row["matmul_tflops"] > 0 < row["copy_gbs"] for row in rows if row["kind"] == "iteration")


def test_a_second_call_goes_on_where_the_first_ended(tmp_path, monkeypatch):
    """Rounds in the file count; those of another commit do not; the reference's rewards are found again."""
    command = ["--smoke", "--architecture", "digits", "--out", str(tmp_path), "--set", "tails.level=eager"]
    file = tmp_path / "rollouts_digits.jsonl"
    rollouts.main([*command, "--variants", REFERENCE])
    rollouts.main([*command, "--variants", f"{REFERENCE},+merged"])
    rows = [row for row in read_rows(file) if row["kind"] == "iteration"]
    assert [row["variant"] for row in rows] == [REFERENCE, "+merged"]
    assert rows[1]["rank_correlation"] > 0.9, "compared with the rewards that the first call wrote down"
    rollouts.main([*command, "--variants", "+merged", "--again"])
    assert [row["variant"] for row in read_rows(file) if row["kind"] == "iteration"] == ["+merged"]
    other = rollouts.environment(torch.device("cpu")) | {"commit": "another"}
    monkeypatch.setattr(rollouts, "environment", lambda device: other)
    rollouts.main([*command, "--variants", "+merged"])
    assert [row["commit"] for row in read_rows(file) if row["kind"] == "iteration"][1:] == ["another"]
    assert len(read(file)) < len(read_rows(file)), "a report is of one comparison"


def test_what_a_set_up_takes_is_known_by_kind(tmp_path):
    """A long compilation elsewhere keeps no plain variant from starting; what was measured is believed."""
    results = Results(tmp_path / "rows.jsonl", {"commit": "one"})
    plain, compiled = (kind_of(settings_of(BY_NAME[name], True)) for name in ("+merged", "+compile"))
    cold = results.set_up_seconds(compiled)
    assert results.set_up_seconds(plain) < 30 < 60 < cold
    warm = {"set_up_seconds": 5.0, "first_seconds": 4.0, "again_seconds": 1.0}
    results.write("warm-up", variant="+compile", set_up_kind=compiled, **warm)
    again = Results(tmp_path / "rows.jsonl", {"commit": "one"})
    assert 10 <= again.set_up_seconds(compiled) < 20 and results.set_up_seconds(plain) < 30
    assert Results(tmp_path / "rows.jsonl", {"commit": "two"}).set_up_seconds(compiled) == cold


def canned(variant: str, number: int, peak: float, seconds: float = 1.0) -> dict:
    """An iteration of 2 TFLOP."""
    return {"kind": "iteration", "variant": variant, "round": number, "seconds": seconds, "cpu_seconds": seconds,
            "rollouts": 10, "phase_seconds": {"tails": seconds}, "beside": [], "rows": {"tails": 1}, "network_tflop": 2,
            "tails_tflop": 2, "matmul_tflops": peak, "copy_gbs": 5, "dtype": "torch.float32", "architecture": "digits",
            "device": "some", "torch": "2", "commit": "c", "date": "today", "threads": 1}  # fmt: skip


def test_utilisation_is_that_of_its_own_round_and_none_above_1_goes_unmarked():
    """Round 1 was slow: its iterations are held against what the machine could do then."""
    rows = [canned("official", 0, 4), canned(REFERENCE, 0, 8), canned("official", 1, 2, 2.0)]
    found = summarise(with_rates(rows))
    assert found["official"].mfu == pytest.approx((2 / 8 + 1 / 2) / 2) and found[REFERENCE].mfu == pytest.approx(0.25)
    busy = with_rates([canned("official", 0, 1.6)])
    assert summarise(busy)["official"].mfu == pytest.approx(1.25) and "1.25 (!)" in table(busy)
    assert "(!) |" not in table(with_rates(rows))


def test_every_timed_iteration_begins_with_no_cached_blocks(bench, monkeypatch):
    """On a GPU, blocks cached for another variant's stream would make cudaMalloc retry within the timed iteration."""
    calls, case = [], bench.case(BY_NAME[REFERENCE])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    timed_reset(case)
    assert calls == [], "a CPU caches nothing"
    monkeypatch.setattr(case.trainer.policy, "device", torch.device("cuda"))
    timed_reset(case)
    assert calls == ["emptied"]


def test_a_cache_folder_is_in_place_before_torch_is_imported(tmp_path):
    """The variables are read when torch is imported: the script, run by itself, sets them first."""
    code = "import sys; sys.argv = ['x', '--cache=kept']; sys.path.insert(0, 'benchmarks'); import importable; "
    code += "importable.keep_cache(sys.argv); assert 'torch' not in sys.modules; import os; "
    code += "print(os.environ['TORCHINDUCTOR_CACHE_DIR'], os.environ['TRITON_CACHE_DIR'])"
    folder = importable.ROOT
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [str(folder / "kept" / name) for name in ("inductor", "triton")]
    source = (folder / "benchmarks" / "rollouts" / "compare.py").read_text()
    assert source.index("keep_cache(sys.argv)") < source.index("import torch")


@pytest.mark.parametrize("name", ["small-sd3", "small-flux"])
def test_real_architectures_run_in_miniature(name, tmp_path):
    """Random pipelines of the published classes, CLIP as reward, guidance, bytes against PIL images."""
    small = {"explore.noises": 2, "explore.siblings": 2, "sample.steps": 3, "learn.rows": 2, "tails.level": "eager"}
    bench = Bench(name, torch.device("cpu"), tmp_path, small)
    measured = {}
    with bench.texts():
        for variant in ("official", REFERENCE):
            case = bench.case(BY_NAME[variant])
            measured[variant] = iterate(case, 0)
    row = figures(bench, case, measured[REFERENCE], measured["official"].rewards)
    assert measured[REFERENCE].rewards.shape == (2, 2, 2)
    assert row["network_tflop"] >= 0 and row["grad_norm"] > 0
    assert (measured["official"].rewards - measured[REFERENCE].rewards).abs().max() < 0.02


def test_warming_up_meets_every_chunk_size():
    """24 branches a fork: one fork fills a chunk of 24; a chunk of 48 and the half one at the end need three."""
    assert forks_to_warm_up(24, 24, 9) == 1
    assert forks_to_warm_up(24, 48, 9) == 3 and forks_to_warm_up(24, 48, 8) == 2
    assert forks_to_warm_up(24, 1000, 9) == 9


def test_pil_images_and_back():
    from PIL import Image

    pixels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(torch.uint8)
    images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    assert torch.equal(bytes_of(images), pixels)


def test_cost_grows_with_size_and_the_curve_says_how(tmp_path):
    """Two sizes of one quantity on the real pipeline, and the exponent of a known curve."""
    sizes = {"siblings": (2, 3)}
    assert linearity.main(["--rounds", "1", "--out", str(tmp_path)], sizes, {"sample.steps": 2}) == 0
    rows = read_rows(tmp_path / "linearity_digits.jsonl")
    assert [(row["size"], row["rollouts"]) for row in rows] == [(2, 8), (2, 8), (3, 12), (3, 12)]
    assert (tmp_path / "linearity_digits.png").stat().st_size > 5_000
    assert linearity.exponent([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)
    assert linearity.exponent([(3, 5.0), (6, 5.0)]) == pytest.approx(0)


def test_the_profile_names_costs(bench, monkeypatch):
    monkeypatch.setattr(bench, "overrides", SMALL | {"sample.steps": 2, "tails.level": "eager"})
    text = profile_iteration.profiled(bench, REFERENCE)
    assert "| matrix products |" in text and "convolutions" in text and "tails" in text
    assert 10 <= sum(line.startswith("| ") for line in text.splitlines()) <= 12


@pytest.mark.parametrize(("name", "kind"), [
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("void pytorch_flash::flash_fwd_kernel", "attention"),
    ("aten::convolution_backward", "convolutions"),
    ("triton_red_fused_native_layer_norm_gelu_3", "compiled chains: norms, elementwise"),
    ("triton_tem_fused_mm_2", "matrix products"),
    ("Memcpy DtoH (Device -> Pageable)", "copies to and from the host"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
])  # fmt: skip
def test_kernels_are_sorted_by_kind(name, kind):
    assert profile_iteration.kind_of(name) == kind
