"""The C++ twin: its own ctest suite, then the contract of the backends through the Python interface."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, oracle_log_ratio
from kernel_contract import (
    CASES,
    check_log_prob,
    check_log_ratio,
    check_loss,
    check_nan,
    check_noise,
    check_step,
    unnumbered,
)  # fmt: skip
from tempflow_kernels.cpu import library as native
from tempflow_kernels.cpu import ops as native_ops
from tempflow_kernels.plain import ops as reference_ops
from tempflow_kernels.plain.reference import Branches

ROOT = Path(__file__).resolve().parents[2]
DRAWN = [unnumbered(case) for case in CASES]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The library of the working tree, built by CMake with its tests."""
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no CMake or no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    subprocess.run(["cmake", "-S", ROOT, "-B", folder], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", folder, "-j2"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stdout + built.stderr, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def library(build):
    """native_ops on that library for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPFLOW_KERNELS_LIBRARY", str(build / "kernels" / "_native.so"))
        native.library.cache_clear()
        yield native.library()
    native.library.cache_clear()


def test_ctest(build):
    run = subprocess.run(["ctest", "--test-dir", build, "--output-on-failure"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "100% tests passed" in run.stdout


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_ratio_and_loss(case):
    check_log_ratio(native_ops, case)
    check_loss(native_ops, case, scale=65536.0)


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_noise_step_and_log_prob(case):
    check_noise(native_ops, case)
    check_step(native_ops, case)
    check_log_prob(native_ops, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even_like_torch(dtype):
    """v = v_old and product = 1: the gradient is the stored noise, here all 16-bit patterns and the ties between."""
    exact = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    exact = torch.sort(exact[torch.isfinite(exact)].float()).values
    values = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, exact * 1.0001, torch.tensor([1e9, float("inf")])])
    values = values[values.abs() < 1e38].view(1, 1, -1)
    zero, count = torch.zeros(1, values.shape[2], dtype=dtype), float(values.shape[2])
    branches = Branches(zero, zero, torch.tensor([[1.0, 0.5, 1.0, 0.5]]), noise=values)
    found = native_ops.velocity_gradient(branches, torch.ones(1, 1), torch.tensor(count))
    expected = values[0].to(dtype)
    assert torch.equal(found.view(torch.int16)[expected != 0], expected.view(torch.int16)[expected != 0])


def test_nan_is_not_clipped_away():
    check_nan(native_ops, Case())


def test_log_ratio_error_at_262144_elements_is_below_1e_8():
    case = Case(shape=(16, 128, 128), rows=3, siblings=2, stored_noise=True, distance=1e-3)
    oracle = oracle_log_ratio(case, case.noise.double(), case.velocity.double().unsqueeze(1))
    found = native_ops.log_ratio(case.ratio_branches, case.siblings)
    assert (found.double() - oracle).abs().max() < 1e-8


def test_results_do_not_depend_on_the_thread_count():
    case, results = Case(shape=(3, 64, 513)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        loss, stats, slopes = native_ops.branch_loss(*case.loss_arguments)
        gradient = native_ops.velocity_gradient(case.branches, slopes, loss)
        results.append((loss, stats, slopes, gradient, native_ops.normal(case.key, 3, case.elements)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_concurrent_callers_do_not_disturb_one_another():
    case = Case(shape=(50, 2049))
    expected, found = native_ops.normal(case.key, 3, case.elements), [None] * 4

    def draw(slot):
        found[slot] = native_ops.normal(case.key, 3, case.elements)

    callers = [threading.Thread(target=draw, args=(slot,)) for slot in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(expected, noise) for noise in found)


def test_it_works_after_fork():
    """No thread pool survives between calls, so a forked data-loader worker can use the library."""
    key = torch.tensor([[1, 2]])
    expected = native_ops.normal(key, 4, 300_000).numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a deadlock must end the child, not the test run
        # numpy, because torch's own thread pool does not survive a fork
        os._exit(0 if native_ops.normal(key, 4, 300_000).numpy().tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_it_links_no_openmp_and_no_torch(build):
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = subprocess.run(["ldd", build / "kernels" / "_native.so"], capture_output=True, text=True).stdout
    assert "omp" not in needed and "torch" not in needed and "python" not in needed


def test_instruction_sets_agree_to_two_ulp(build, tmp_path):
    """AVX-512 and AVX2 bit for bit (both fuse multiply and add); the generic path, without fusing, to 2 ulp."""
    program = (
        "import sys, torch; from tempflow_kernels.cpu import library as native, ops as native_ops;"
        "torch.save((native.describe(), native_ops.normal(torch.tensor([[5, 9]]), 2, 100003)), sys.argv[1])"
    )
    draws = {}
    for name in ("avx512", "avx2", "generic"):
        environment = os.environ | {"TEMPFLOW_KERNELS_INSTRUCTION_SET": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True, env=environment)
        description, noise = torch.load(tmp_path / name, weights_only=True)
        draws[description.split(",")[0]] = noise
    fused = [noise for name, noise in draws.items() if name != "generic"]
    assert all(torch.equal(fused[0], noise) for noise in fused[1:])
    for noise in fused:
        assert (noise - draws["generic"]).abs().max() < 1e-6


def test_philox_words_are_those_of_the_reference(library):
    from tempflow_kernels import philox4x32

    generator = torch.Generator().manual_seed(1)
    for numbers in torch.randint(0, 2**32, (50, 6), generator=generator).tolist():
        words = (ctypes.c_uint32 * 4)()
        library.tfk_philox4x32((ctypes.c_uint32 * 4)(*numbers[:4]), (ctypes.c_uint32 * 2)(*numbers[4:]), words)
        expected = philox4x32(tuple(torch.tensor(n) for n in numbers[:4]), tuple(torch.tensor(n) for n in numbers[4:]))
        assert list(words) == [int(word) for word in expected]


def test_normals_differ_from_plain_torch_by_at_most_an_ulp_or_two_of_their_size():
    key = torch.tensor([[3, 0]])
    found, plain = native_ops.normal(key, 1, 1_000_000), reference_ops.normal(key, 1, 1_000_000)
    distance = (found - plain).abs()
    assert distance.max() < 1e-6
    large = plain.abs() > 0.1
    spacing = torch.exp2(torch.floor(torch.log2(plain.abs())) - 23)
    assert (distance / spacing)[large].max() <= 3
    assert (found == plain).float().mean() > 0.6


def test_a_missing_library_is_an_error_when_it_is_asked_for(monkeypatch, library):
    monkeypatch.setenv("TEMPFLOW_KERNELS_LIBRARY", "/nowhere/_native.so")
    native.library.cache_clear()
    assert not native.available() and "not built" in native.describe()
    with pytest.raises(RuntimeError, match="no C\\+\\+ library at /nowhere"):
        native.library()
    monkeypatch.undo()
    native.library.cache_clear()
