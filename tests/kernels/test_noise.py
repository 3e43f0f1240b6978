"""The noise: known answers, the mapping from elements to counters, and whether it is normal and independent."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tempflow_kernels as tk
import torch
from kernel_cases import oracle_draw
from scipy import stats
from tempflow_kernels.cpu import library as native
from tempflow_kernels.cpu import ops as native_ops
from tempflow_kernels.plain import ops as reference_ops

# Random123, kat_vectors: philox4x32 with 10 rounds, (counter, key, words).
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DRAWS = 10_000_000


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_random123_known_answers(counter, key, words):
    found = tk.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == words


def test_mapping_is_that_of_the_specification():
    latents, key = torch.zeros(2, 3, 3), torch.tensor([[-3, 2**32 - 2], [99, -1]])
    noise = tk.normal_like(latents, key, siblings=2)
    for row, (seed, offset) in enumerate(key.tolist()):
        for sibling in range(2):
            expected = oracle_draw(seed, offset + 3 * sibling, 9)  # 9 elements take 3 counters
            assert np.abs(noise[row, sibling].flatten().numpy() - expected).max() < 6e-7


def test_a_draw_depends_on_its_key_alone():
    key = torch.tensor([[5, 100], [6, 200], [7, 300]])
    whole = tk.normal_like(torch.zeros(3, 10, 10), key, siblings=4)
    part = tk.normal_like(torch.zeros(1, 10, 10), key[1:2], siblings=2)
    assert torch.equal(whole[1:2, :2], part)
    later = tk.normal_like(torch.zeros(1, 10, 10), key[1:2] + torch.tensor([[0, 25 * 3]]))
    assert torch.equal(whole[1:2, 3:], later)


def test_fold_key_is_one_philox_call():
    words = tk.philox4x32(tuple(map(torch.tensor, (1, 2, 3, 0))), tuple(map(torch.tensor, (9, 0))))
    assert int(tk.fold_key(9, 1, 2, 3)) & (2**64 - 1) == int(words[0]) | int(words[1]) << 32
    with pytest.raises(ValueError, match="identity"):
        tk.fold_key(1, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def draws():
    """1e7 deviates: 10 rows of 10 siblings of 1e5 elements, from whatever backend serves the CPU."""
    backend = native_ops if native.available() else reference_ops
    key = torch.stack([tk.fold_key(2026, torch.arange(10), 3), torch.zeros(10, dtype=torch.int64)], dim=1)
    return backend.normal(key, 10, DRAWS // 100).numpy().astype(np.float64)


def test_moments(draws):
    """Sample moments within 4.5 standard errors of those of the normal distribution."""
    x = draws.ravel()
    for order, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        error = abs((x**order).mean() - expected)
        assert error < 4.5 * math.sqrt(variance / x.size), f"moment {order}: off by {error:.3g}"


def test_distribution_function(draws):
    statistic = stats.kstest(draws.ravel()[:2_000_000], "norm").statistic
    assert statistic * math.sqrt(2_000_000) < 1.95, "Kolmogorov-Smirnov at 0.1 %"


@pytest.mark.parametrize("threshold", [2.0, 3.0, 4.0, 4.5, 5.0])
def test_tails(draws, threshold):
    expected = DRAWS * 2 * stats.norm.sf(threshold)
    assert abs((np.abs(draws) > threshold).sum() - expected) < 5 * math.sqrt(expected) + 1


def test_tails_reach_beyond_5_7_sigma():
    """Words near 0 give deviates up to sqrt(2 * 33 ln 2) = 6.76; generators with 24-bit uniforms stop at 5.7."""
    from tempflow_kernels.plain.philox import _box_muller

    extreme, _ = _box_muller(torch.tensor([0]), torch.tensor([0]))
    assert 6.7 < float(extreme) < 6.8
    backend = native_ops if native.available() else reference_ops
    key = torch.tensor([[1, 0]])
    count = 20_000_000 if backend is native_ops else 4_000_000
    expected = count * 2 * stats.norm.sf(5.2)
    found = int((backend.normal(key, 1, count).abs() > 5.2).sum())
    assert abs(found - expected) < 4 * math.sqrt(expected) + 2


def _correlation(a, b):
    return abs(np.mean(a * b)) * math.sqrt(a.size)


def test_independence(draws):
    """Correlation of values and of squares between rows, siblings, neighbouring elements and lanes of one counter."""
    pairs = {
        "rows": (draws[:-1], draws[1:]),
        "siblings": (draws[:, :-1], draws[:, 1:]),
        "neighbours": (draws[..., :-1], draws[..., 1:]),
        "lanes 0 and 2": (draws[..., 0::4], draws[..., 2::4]),
        "counters": (draws[..., :-4], draws[..., 4:]),
    }
    for name, (a, b) in pairs.items():
        assert _correlation(a, b) < 4.5, name
        assert _correlation(a**2 - 1, b**2 - 1) / 2 < 4.5, f"squares of {name}"


def test_independence_of_steps_and_of_neighbouring_seeds():
    backend = native_ops if native.available() else reference_ops
    steps = torch.stack([tk.fold_key(7, 0, 0, torch.arange(8)), torch.zeros(8, dtype=torch.int64)], dim=1)
    seeds = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)], dim=1)
    for key in (steps, seeds):
        noise = backend.normal(key, 1, 200_000)[:, 0].double()
        correlation = torch.corrcoef(noise) - torch.eye(8)
        assert correlation.abs().max() * math.sqrt(200_000) < 4.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", "fast"), ("exact", "exact"), ("fast", "fast"), ("quick", "TEMPFLOW_KERNELS_NOISE: found 'quick'")],
)
def test_noise_mode_from_the_environment(value, expected):
    program = "import tempflow_kernels as tk; print(tk.noise_mode(), tk.backend_info()['noise'])"
    environment = os.environ | {"TEMPFLOW_KERNELS_NOISE": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"TRITON_INTERPRET": "0", "TEMPFLOW_KERNELS_BACKEND": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value != "quick")
    if run.returncode == 0:
        assert run.stdout.split(" ", 1)[1].startswith(f"cpu: exact, cuda: {expected}"), "a CPU draws exact noise"
