"""Numerics, determinism, graph replay and memory access of the Triton kernels on a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kernel_contract as contract
import torch
from half_hour.measure import Options, Skip
from kernel_cases import Case, oracle_noise
from operators.noise_modes import MODES, use_noise
from tempflow_kernels.gpu import ops as triton_ops
from torch import Tensor

TINY_CASES = 3
FAST_ERROR = 1e-5
"""of fast normals against exact ones"""
OTHER_WORD = 1e-2
"""a normal that is so far off was made of other random words"""


def _check(options: Options, name: str, function: Callable[[], object]) -> None:
    """One row: passed, or what was wrong."""
    try:
        figure, problem = function(), ""
    except AssertionError as error:
        figure, problem = None, " ".join(str(error).split())[:300] or "an assertion without words"
    options.write(check=name, passed=not problem, problem=problem, figure=figure)
    print(f"{name}: {problem or figure or 'passed'}", flush=True)
    if problem:
        FAILURES.append(name)


FAILURES: list[str] = []
"""checks of this process that failed"""


def _all_passed() -> None:
    if FAILURES:
        raise SystemExit(1)


def numerics(options: Options) -> None:
    """The contract of all backends in exact mode; words; fast normals and what is computed from them."""
    chosen = contract.CASES[: TINY_CASES if options.tiny else None]
    cases = [contract.on_device(case, options.device) for case in chosen]
    use_noise("exact")
    for case in cases:
        drawn = contract.unnumbered(case)
        checks = [(contract.check_loss, case), (contract.check_log_ratio, case)]
        checks += [(check, drawn) for check in (contract.check_noise, contract.check_step, contract.check_log_prob)]
        for check, given in checks:
            _check(options, f"{check.__name__} {given}", lambda check=check, given=given: check(triton_ops, given))
    _check(options, "NaN shows", lambda: contract.check_nan(triton_ops, Case(device=options.device)))
    size = (2, 8, 8) if options.tiny else (16, 64, 64)
    case = Case(shape=size, siblings=6, device=options.device)
    for mode in MODES:
        _check(options, f"words, {mode} noise", lambda mode=mode: _same_words(case, mode))
        _check(options, f"step and loss agree, {mode} noise", lambda mode=mode: _step_and_loss_agree(case, mode))
    _all_passed()


def _same_words(case: Case, mode: str) -> str:
    """Every normal is the one that float64 makes of the words that plain torch draws."""
    use_noise(mode)
    found = triton_ops.normal(case.key, case.siblings, case.elements).double()
    error = (found - oracle_noise(case).flatten(2)).abs()
    others = int((error > OTHER_WORD).sum())
    assert others == 0, f"{others} of {error.numel()} normals are of other words"
    assert float(error.max()) <= FAST_ERROR, f"largest error {float(error.max()):.3g}, allowed {FAST_ERROR:g}"
    return f"{error.numel()} normals of the same words, largest error {float(error.max()):.2g}"


def _step_and_loss_agree(case: Case, mode: str) -> str:
    """The noise that the step added is the noise that the log-ratio draws again."""
    use_noise(mode)
    drawn = contract.unnumbered(case)
    noise = triton_ops.normal(drawn.key, drawn.siblings, drawn.elements).view(-1, drawn.siblings, *drawn.shape)
    redrawn = triton_ops.log_ratio(drawn.ratio_branches, drawn.siblings)
    stored = triton_ops.log_ratio(drawn.ratio_branches._replace(key=None, noise=noise), drawn.siblings)
    error, size = float((redrawn - stored).abs().max()), float(stored.abs().max())
    assert error <= 1e-5 * size, f"log-ratio of drawn and of stored noise differ by {error:.3g} of {size:.3g}"
    return f"log-ratio of drawn and stored noise within {error / size:.2g}"


def all_outputs(case: Case) -> list[Tensor]:
    """Every result of one call of every operator."""
    loss, stats, slopes = triton_ops.branch_loss(*case.loss_arguments)
    gradient = triton_ops.velocity_gradient(case.branches, slopes, loss)
    step = (case.latents, case.velocity, case.coef, case.key, case.siblings, case.velocity_uncond, case.guidance)
    following, log_prob = triton_ops.transition_step(*step)
    given = (following, case.latents, case.velocity, case.coef)
    return [
        loss, stats, slopes, gradient, following, log_prob, triton_ops.transition_log_prob(*given),
        triton_ops.transition_log_prob_gradient(slopes, *given),
        triton_ops.log_ratio(case.ratio_branches, case.siblings),
        triton_ops.normal(case.key, case.siblings, case.elements),
    ]  # fmt: skip


def determinism(options: Options) -> None:
    """Bit-identical repeats in every mode of noise."""
    size, repeats = ((4, 8, 8), 2) if options.tiny else ((16, 64, 64), 100)
    case = Case(shape=size, siblings=6, device=options.device)
    for mode in MODES:
        _check(options, f"repeats, {mode} noise", lambda mode=mode: repeats_are_equal(case, mode, repeats))
    _all_passed()


def repeats_are_equal(case: Case, mode: str, repeats: int) -> str:
    use_noise(mode)
    first = all_outputs(case)
    for repeat in range(repeats):
        assert all(map(torch.equal, first, all_outputs(case))), f"repeat {repeat} differs"
    return f"{repeats} repeats of every operator bit-identical"


def graph(options: Options) -> None:
    """One capture in every mode of noise."""
    if options.device == "cpu":
        raise Skip("CUDA graphs need a GPU")
    for mode in MODES:
        _check(options, f"replays, {mode} noise", lambda mode=mode: replays_follow(options.device, mode))
    _all_passed()


def replays_follow(device: str, mode: str) -> str:
    """Replays follow keys, coefficients and terms, because all live in device tensors."""
    use_noise(mode)
    case = Case(shape=(16, 64, 64), siblings=6, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_outputs(case)
    torch.cuda.current_stream().wait_stream(stream)
    captured_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured_graph):
        captured = all_outputs(case)
    before = [torch.full_like(tensor, float("nan")) for tensor in captured]
    for change in range(5):
        case.key.add_(1000 + change)
        case.coef.mul_(0.99)
        case.terms.mul_(0.99)
        captured_graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in captured]
        assert all(map(torch.equal, replayed, all_outputs(case))), f"replay {change} differs from the eager call"
        assert not torch.equal(replayed[-1], before[-1]), f"replay {change} drew the noise of the one before"
        before = replayed
    return "5 replays with changed keys, coefficients and terms equal eager calls bit for bit"


def sanitizer(options: Options) -> None:
    """memcheck over one call of every kernel, odd sizes included."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.device == "cpu" or tool is None:
        raise Skip("no GPU" if options.device == "cpu" else "compute-sanitizer is not installed")
    # Errors of the API are left out: torch asks the driver for functions that older drivers do not have.
    watch = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    program = Path(__file__).with_name("measure.py")
    command = [*watch, sys.executable, str(program), "sanitized", "--folder", str(options.folder)]
    run = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    options.write(check="memcheck", passed=run.returncode == 0, problem=f"exit status {run.returncode}", figure=None)
    if run.returncode:
        FAILURES.append("memcheck")
    _all_passed()


def sanitized(options: Options) -> None:
    """What compute-sanitizer watches."""
    for shape in ((3, 7, 11), (1,), (2049,), (16, 16)):
        all_outputs(Case(shape=shape, device="cuda"))
    torch.cuda.synchronize()
