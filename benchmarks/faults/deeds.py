"""What is done to a run from outside: to its processes, its folder, its server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults.kinds import Scene

AGAIN = 0.4
"""seconds to the second signal"""


def send(number: int, target: str = "run") -> Callable[[Scene], None]:
    """A signal to what the user started (`run`), or to `rank0` or `rank1`."""
    return lambda scene: os.kill(scene.started.process(target), number)


def send_twice(first: int, second: int) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        send(first)(scene)
        time.sleep(AGAIN)
        if scene.started.poll() is None:
            send(second)(scene)

    return do


def kill_all(scene: Scene) -> None:
    """As when a machine loses its power: every process at once."""
    scene.started.kill()


def another(scene: Scene) -> None:
    """A second process with the same arguments."""
    scene.others.append(scene.start_another())


def remove(part: str = "") -> Callable[[Scene], None]:
    """The run's folder, or a folder in it, is gone at one blow."""

    def do(scene: Scene) -> None:
        aside = scene.run.parent / "removed"
        (scene.run / part).rename(aside)
        shutil.rmtree(aside)

    return do


def replace_by_file(part: str) -> Callable[[Scene], None]:
    """A file in the place of a folder, which is kept beside."""

    def do(scene: Scene) -> None:
        (scene.run / part).rename(scene.run.parent / "aside")
        (scene.run / part).write_text("")

    return do


def put_back(part: str) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        (scene.run / part).unlink()
        (scene.run.parent / "aside").rename(scene.run / part)

    return do


def lock_up(scene: Scene) -> None:
    """The folder and all in it can be read only."""
    for path in (*scene.run.rglob("*"), scene.run):
        path.chmod(0o555 if path.is_dir() else 0o444)


def open_up(scene: Scene) -> None:
    for path in (scene.run, *scene.run.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def fill(scene: Scene) -> None:
    """Not a byte is left on the disk."""
    with (scene.run.parent / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def clear(scene: Scene) -> None:
    (scene.run.parent / "filler").unlink()


def newest(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def truncate(name: str) -> Callable[[Path], None]:
    """The newest checkpoint's file has half its bytes."""

    def do(run: Path) -> None:
        path = newest(run) / name
        os.truncate(path, path.stat().st_size // 2)

    return do


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda run: (newest(run) / name).write_bytes(data) and None


def flip(name: str) -> Callable[[Path], None]:
    """One bit near the end of the newest checkpoint's file is another."""

    def do(run: Path) -> None:
        path = newest(run) / name
        data = bytearray(path.read_bytes())
        data[-1001] ^= 1
        path.write_bytes(data)

    return do


def fill_with_nan(name: str) -> Callable[[Path], None]:
    """Tensors of the newest checkpoint's file are NaN; the file is a good one otherwise."""

    def do(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = newest(run) / name
        tensors = {key: value * float("nan") if value.is_floating_point() else value
                   for key, value in load_file(path).items()}  # fmt: skip
        save_file(tensors, path)

    return do


def drop(name: str) -> Callable[[Path], None]:
    return lambda run: (newest(run) / name).unlink()


def set_iteration(number: int) -> Callable[[Path], None]:
    """The newest checkpoint says that so many iterations are done."""

    def do(run: Path) -> None:
        path = newest(run) / "state.json"
        state = json.loads(path.read_text())
        state["progress"]["iteration"] = number
        path.write_text(json.dumps(state))

    return do


def leave_partial(run: Path) -> None:
    """What a kill amid saving leaves: a folder with some files of a checkpoint."""
    partial = run / "checkpoints" / ".step_000005.partial"
    partial.mkdir()
    shutil.copy(newest(run) / "parameters.safetensors", partial)


def every(do: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same to all checkpoints."""

    def do_all(run: Path) -> None:
        for path in sorted((run / "checkpoints").glob("step_*")):
            aside = run / "checkpoints" / f"aside_{path.name}"
            do(run)
            newest(run).rename(aside)
        for path in (run / "checkpoints").glob("aside_*"):
            path.rename(path.with_name(path.name.removeprefix("aside_")))

    return do_all


def stop_server(scene: Scene) -> None:
    scene.server.stop()


def restart_server(scene: Scene) -> None:
    """The server is killed and, two seconds later, there again."""
    scene.server.stop()
    time.sleep(2)
    scene.server.start()


TERM, INT, HUP, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL
