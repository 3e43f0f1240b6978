"""Numerics, determinism, graph replay and memory access of the Triton kernels on a device."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kernel_contract as contract
import torch
from half_hour.measure import Broken, Options, Skip, Unfinished
from half_hour.runner import end_with_parent, rows_of
from kernel_cases import Case, oracle_noise
from machine.environment import still_works
from tempflow_kernels import use_noise
from tempflow_kernels.gpu import ops as triton_ops
from tempflow_kernels.noise_setting import MODES
from torch import Tensor

TINY_CASES = 3
STEP_ERROR = 1e-4
"""of noise that is read off fp32 latents, relative to the largest log-ratio"""
FAST_ERROR = 1e-5
"""of fast normals against exact ones"""
OTHER_WORD = 1e-2
"""a normal that is so far off was made of other random words"""


def _check(options: Options, name: str, function: Callable[[], object]) -> None:
    """One row, unless the file has it: passed, or what was wrong, whatever it was.

    Raises:
        Unfinished: the time is over.
        Broken: no later check of this process would mean anything.
    """
    if name in {row["check"] for row in rows_of(options.file)}:
        return
    if options.left() < 0:
        raise Unfinished(f"at {name}")
    try:
        figure, problem = function(), ""
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        figure, problem = None, f"{kind}{' '.join(str(error).split()) or 'without words'}"[:300]
    options.write(check=name, passed=not problem, problem=problem, figure=figure)
    print(f"{name}: {problem or figure or 'passed'}", flush=True)
    if problem and not still_works(options.device):
        raise Broken(f"the device is out of order since {name}")


def _all_passed(options: Options) -> None:
    """Those of earlier processes as well."""
    if not all(row["passed"] for row in rows_of(options.file)):
        raise SystemExit(1)


def many_programs(options: Options) -> Case:
    """Rows and siblings by which thousands of programs meet in the sums, of which the last to finish adds them up."""
    rows, siblings = (5, 2) if options.tiny else (512, 24)
    return Case(rows=rows, siblings=siblings, shape=(64,), device=options.device)


def numerics(options: Options) -> None:
    """The contract of all backends in exact mode; words; fast normals and what is computed from them."""
    chosen = contract.CASES[: TINY_CASES if options.tiny else None]
    cases = [*(contract.on_device(case, options.device) for case in chosen), many_programs(options)]
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
    _all_passed(options)


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
    """The noise that the step added, read off its next latents, is the noise that the log-ratio draws again."""
    use_noise(mode)
    step = (case.latents, case.velocity_old, case.coef, case.key, case.siblings, None, 1.0)
    following, _ = triton_ops.transition_step(*step)
    x_coef, v_coef, std = (column.view(-1, 1, *[1] * len(case.shape)) for column in case.coef.double().unbind(1))
    mean = x_coef * case.latents.double().unsqueeze(1) + v_coef * case.velocity_old.double().unsqueeze(1)
    noise = torch.where(std > 0, (following.double() - mean) / torch.where(std > 0, std, 1.0), 0.0).float()
    redrawn = triton_ops.log_ratio(case.ratio_branches, case.siblings)
    stored = triton_ops.log_ratio(case.ratio_branches._replace(key=None, noise=noise), case.siblings)
    error, size = float((redrawn - stored).abs().max()), float(stored.abs().max())
    assert error <= STEP_ERROR * size, f"log-ratio of drawn noise and of the step's: {error:.3g} off, of {size:.3g}"
    return f"log-ratio of drawn noise and of the step's within {error / size:.2g}"


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
    size, repeats = ((4, 8, 8), 1) if options.tiny else ((16, 64, 64), 100)
    case = Case(shape=size, siblings=6, device=options.device)
    for mode in MODES:
        for given in (case, many_programs(options)):
            repeat = functools.partial(repeats_are_equal, given, mode, repeats)
            _check(options, f"repeats, {given.rows} rows, {mode} noise", repeat)
    _all_passed(options)


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
    _all_passed(options)


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
    run = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                         preexec_fn=functools.partial(end_with_parent, os.getpid()))  # fmt: skip
    options.write(check="memcheck", passed=run.returncode == 0, problem=f"exit status {run.returncode}", figure=None)
    _all_passed(options)


def sanitized(options: Options) -> None:
    """What compute-sanitizer watches."""
    for shape in ((3, 7, 11), (1,), (2049,), (16, 16)):
        all_outputs(Case(shape=shape, device="cuda"))
    torch.cuda.synchronize()
