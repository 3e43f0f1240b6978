"""Fast noise in Triton's interpreter: a stand-in for the GPU's instructions, and one that errs as far as they may.

`test_triton.py` starts it. By hand: TRITON_INTERPRET=1 pytest tests/kernels/test_fast_noise.py
"""

import math
import os

import numpy as np
import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import Case
from kernel_contract import check_fast_noise
from scipy import stats

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1 only (test_triton.py starts it so)", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl
from tempflow_kernels.gpu import ops as triton_ops
from tempflow_kernels.gpu.fast import interpreted_pair, polar_pair
from tempflow_kernels.gpu.launch import Launcher
from tempflow_kernels.gpu.noise import exact_pair, philox_words

COUNT = 2**16


@pytest.fixture(autouse=True)
def restored():
    before = tk.noise_mode()
    yield
    tk.use_noise(before)


@triton.jit
def low_log2(x):
    return tl.log2(x) - 2.384185791015625e-07 * tl.maximum(1.0, tl.abs(tl.log2(x)))


@triton.jit
def high_log2(x):
    return tl.log2(x) + 2.384185791015625e-07 * tl.maximum(1.0, tl.abs(tl.log2(x)))


@triton.jit
def high_sqrt(x):
    return tl.sqrt(x) * 1.00000011920929


@triton.jit
def high_sin(x):
    return tl.sin(x) + 6.743495761743044e-07


@triton.jit
def low_cos(x):
    return tl.cos(x) - 6.743495761743044e-07


@triton.jit
def low_pair(first, second):
    """As far from the truth as PTX documents: 2^-22 in the logarithm, 2^-23 in the root, 2^-20.5 in sine and cosine."""
    return polar_pair(first, second, low_log2, high_sqrt, high_sin, low_cos, 1.4629180792671596e-09)


@triton.jit
def high_pair(first, second):
    return polar_pair(first, second, high_log2, high_sqrt, high_sin, low_cos, 1.4629180792671596e-09)


@triton.jit
def evaluate(words, out, count, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = tl.load(words + index).to(tl.uint32), tl.load(words + count + index).to(tl.uint32)
    cosine, sine = PAIR(first, second)
    tl.store(out + index, cosine)
    tl.store(out + count + index, sine)


@triton.jit
def draw(out, seed, PAIR: tl.constexpr, QUADS: tl.constexpr):
    w0, w1, w2, w3 = philox_words(tl.load(seed), tl.program_id(0).to(tl.int64) * QUADS, QUADS)
    n0, n1 = PAIR(w0, w1)
    n2, n3 = PAIR(w2, w3)
    place = out + (tl.program_id(0) * QUADS + tl.arange(0, QUADS)) * 4
    tl.store(place, n0)
    tl.store(place + 1, n1)
    tl.store(place + 2, n2)
    tl.store(place + 3, n3)


def pairs_of(words, pair):
    out = torch.empty(words.shape)
    evaluate[(words.shape[1] // COUNT,)](words, out, words.shape[1], PAIR=pair, BLOCK=COUNT)
    return out


def extreme_words():
    """Words at both ends and about 1 - 2^-11, where the logarithm gives way, with any second word; and any pair."""
    seeded = torch.Generator().manual_seed(0)
    ends = torch.cat(
        [torch.arange(4096), 2**32 - 1 - torch.arange(16384), 2**32 - 2**21 + torch.arange(-8192, 8192) * 16]
    )
    near = 2**32 - 2**21 + torch.randint(-(2**20), 2**20, (COUNT - ends.numel(),), generator=seeded)
    first = torch.cat([ends, near, torch.randint(0, 2**32, (3 * COUNT,), generator=seeded)])
    second = torch.cat([torch.randint(0, 2**32, (COUNT,), generator=seeded), extremes_of_angles(seeded)])
    return torch.stack([first, second])


def extremes_of_angles(seeded):
    ends = torch.cat([torch.arange(1024), 2**32 - 1 - torch.arange(1024)])
    return torch.cat([ends, torch.randint(0, 2**32, (3 * COUNT - 2048,), generator=seeded)])


@pytest.mark.parametrize("pair", [interpreted_pair, low_pair, high_pair], ids=lambda pair: pair.__name__)
def test_normals_are_within_1e_5_of_the_exact_ones_and_never_nan(pair):
    words = extreme_words()
    found, exact = pairs_of(words, pair), pairs_of(words, exact_pair)
    assert torch.isfinite(found).all()
    assert (found - exact).abs().max() < 1e-5


def test_without_its_first_term_the_logarithm_would_be_nan_or_wrong():
    """The test above can fail: what the documented error does to a radius near 0."""
    u = 1 - 2.0**-20
    radicand = -2 * math.log(2) * (math.log2(u) + 2.0**-22)
    assert abs(math.sqrt(radicand) - math.sqrt(-2 * math.log(u))) > 1e-5
    assert math.log2(1) + 2.0**-22 > 0, "the root of a negative number"


def test_worst_case_over_all_words():
    """By interval arithmetic in float64: |fast - exact| from the documented bounds, for every radius and any angle."""
    near, far = 2**32 - np.arange(1, 2**22, 7), np.unique(np.geomspace(1, 2**32 - 2**21, 400_000).astype(np.int64))
    word = np.concatenate([[0], far, near]).astype(np.float32).astype(np.float64)
    u = np.float32(word * 2.0**-32 + 2.0**-33).astype(np.float64)
    log2 = np.log2(u)
    error = 2.0**-22 * np.maximum(1, np.abs(log2))
    replaced = u > 0.99951171875
    square = [
        np.where(replaced, 2 - 2 * u, -2 * math.log(2) * (log2 + s * error) * (1 - s * 2.0**-23)) for s in (-1, 1)
    ]
    assert min(map(np.min, square)) >= 0, "no root of a negative number"
    radius = np.sqrt(-2 * np.log(u))
    apart = np.maximum(*(np.abs(np.sqrt(s) - radius) for s in square)) + radius * 2.0**-22  # roots
    assert (apart + radius * (2.0**-20.5 + 1.5e-7 + turn_error() + 2.0**-23)).max() < 1e-5


def turn_error():
    """Largest difference between the two roundings of the angle."""
    word = np.unique(np.geomspace(1, 2**32 - 1, 2_000_000).astype(np.int64)).astype(np.float32)
    uniform = np.float32(word.astype(np.float64) * 2.0**-32 + 2.0**-33)
    exact, fast = np.float32(6.2831854820251465) * uniform, word * np.float32(1.4629180792671596e-09)
    assert np.array_equal(exact[word >= 2**24], fast[word >= 2**24])
    return np.abs(exact.astype(np.float64) - fast).max()


@pytest.fixture(scope="module", params=[interpreted_pair, low_pair, high_pair], ids=lambda pair: pair.__name__)
def draws(request):
    """2^21 counters of four normals."""
    out = torch.empty(2**21, 4)
    draw[(2**21 // COUNT,)](out, torch.tensor([2026]), PAIR=request.param, QUADS=COUNT)
    return out.numpy().astype(np.float64)


def test_moments(draws):
    x = draws.ravel()
    for order, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**order).mean() - expected) < 4.5 * math.sqrt(variance / x.size), f"moment {order}"


def test_distribution_function_and_tails(draws):
    x = draws.ravel()
    assert stats.kstest(x[:1_000_000], "norm").statistic * 1000 < 1.95, "Kolmogorov-Smirnov at 0.1 %"
    for threshold in (2.0, 3.0, 4.0, 4.5):
        expected = x.size * 2 * stats.norm.sf(threshold)
        assert abs((np.abs(x) > threshold).sum() - expected) < 5 * math.sqrt(expected) + 1, threshold


def test_lanes_of_a_counter_are_independent(draws):
    for power in (1, 2):
        values = draws**power - (power == 2)
        correlation = np.corrcoef(values.T) - np.eye(4)
        assert np.abs(correlation).max() * math.sqrt(len(draws)) < 4.5, power


def test_step_log_ratio_loss_and_gradient_draw_the_same():
    check_fast_noise(triton_ops, Case(siblings=5))
    check_fast_noise(triton_ops, Case(shape=(32, 33), siblings=2, optional=()))


def loss_of(velocity, case):
    return tk.branch_loss(velocity, case.velocity_old, case.advantages, case.terms, case.key)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mode_changed_before_the_backward_is_refused(compiled):
    if os.environ.get("TEMPFLOW_KERNELS_BACKEND") != "triton":
        pytest.skip("runs with TEMPFLOW_KERNELS_BACKEND=triton only")
    case, function = Case(), torch.compile(loss_of, backend="aot_eager", fullgraph=True) if compiled else loss_of
    velocity = case.velocity.clone().requires_grad_()
    tk.use_noise("fast")
    loss = function(velocity, case)
    tk.use_noise("exact")
    with pytest.raises(RuntimeError, match="noise mode"):
        loss.backward()
    function(velocity, case).backward()
    assert velocity.grad.abs().max() > 0


def test_the_mode_is_chosen_and_told():
    tk.use_noise("fast")
    assert tk.noise_mode() == "fast" and "cuda: fast" in tk.backend_info()["noise"]
    with pytest.raises(ValueError, match="mode"):
        tk.use_noise("quick")
    assert tk.noise_mode() == "fast"


@pytest.mark.parametrize("enough", [1, 40, 10**6])
def test_dealing_siblings_to_more_programs_changes_no_bit(enough, monkeypatch):
    case = Case(shape=(1030,), siblings=3)

    def results():
        triton_ops.geometry.cache_clear()
        following, log_prob = triton_ops.transition_step(case.latents, case.velocity, case.coef, case.key, 3, None, 1.0)
        again = triton_ops.transition_log_prob(following, case.latents, case.velocity, case.coef)
        return [following, log_prob, again, *triton_ops.branch_loss(*case.loss_arguments)]

    expected = results()
    monkeypatch.setattr(triton_ops, "ENOUGH", enough)
    assert all(map(torch.equal, results(), expected))
    triton_ops.geometry.cache_clear()


def test_rows_do_not_depend_on_their_batch():
    case = Case(shape=(1500,), siblings=5)
    whole = triton_ops.log_ratio(case.ratio_branches, 5)
    part = case.ratio_branches._replace(**{
        name: getattr(case, name)[2:] for name in ("velocity", "velocity_old", "terms", "key")
    })  # fmt: skip
    assert torch.equal(triton_ops.log_ratio(part, 5), whole[2:])


def test_a_loss_takes_two_launches_and_its_gradient_one(monkeypatch):
    launched, launch = [], Launcher.__call__

    def counting(self, *arguments):
        launched.append(self)
        launch(self, *arguments)

    monkeypatch.setattr(Launcher, "__call__", counting)
    case = Case()
    slopes = triton_ops.branch_loss(*case.loss_arguments)[2]
    assert launched == [triton_ops.sum_moments, triton_ops.finish_objective]
    triton_ops.velocity_gradient(case.branches, slopes, torch.ones(()))
    assert launched[2:] == [triton_ops.mix_gradient]
