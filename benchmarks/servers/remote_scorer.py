"""What a server costs: the same scorer in this process and behind a server on this machine.

    python benchmarks/servers/remote_scorer.py [--images 64] [--side 512] [--rounds 15] [--output rows.jsonl]

Batches of smooth random pictures are scored by `jpeg_compressibility`, which is trivial, in three ways that take turns,
so that a busy machine hits all alike: here; by a server, one batch after another; and by a server, two batches in
flight, as the score queue sends them while the sampler goes on. Rows (JSON lines) give the median milliseconds a batch,
the processor's milliseconds (both processes), the median of the differences within a round, and, as a floor, what it
takes to send the bytes alone over a plain socket.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.servers.fleet import Fleet, Terms

SCORER = "jpeg_compressibility"


def pictures(count: int, side: int) -> Tensor:
    """Smooth uint8 pictures (count, 3, side, side)."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")
    return (fine * 255).clamp(0, 255).to(torch.uint8)


def plain_socket(images: Tensor) -> Callable[[], None]:
    """Sends the images' bytes to a thread that reads them: the floor of what a loopback costs."""
    data, listener = memoryview(images.view(-1).numpy()), socket.create_server(("127.0.0.1", 0))

    def receive() -> None:
        target = memoryview(bytearray(len(data)))
        while True:
            line, _ = listener.accept()
            with line:
                place = 0
                while place < len(data):
                    place += line.recv_into(target[place:])
                line.sendall(b"k")

    threading.Thread(target=receive, daemon=True).start()

    def send() -> None:
        with socket.create_connection(listener.getsockname()) as line:
            line.sendall(data)
            line.recv(1)

    return send


def processor_seconds(process: int) -> float:
    """Of this process and the server, since they started."""
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object], batches: int, process: int) -> tuple[float, float]:
    """Milliseconds a batch, by the clock and of the processor."""
    start, busy = time.perf_counter(), processor_seconds(process)
    work()
    spent = time.perf_counter() - start, processor_seconds(process) - busy
    return 1e3 * spent[0] / batches, 1e3 * spent[1] / batches


def measure(url: str, process: int, images: Tensor, rounds: int, batch: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds a batch, by the clock and of the processor, by way and round."""
    prompts = [Prompt("")] * len(images)
    here = load_scorer("here", SCORER, len(images))
    fleet = Fleet([url], Terms(requests=8, timeout=60, patience=60))
    assert torch.equal(fleet.score(SCORER, images, prompts, batch), here(images, prompts))
    send, threads, several = plain_socket(images), ThreadPoolExecutor(2), 4

    def there(_: int = 0) -> Tensor:
        return fleet.score(SCORER, images, prompts, batch)

    ways = {
        "here": (lambda: [here(images, prompts) for _ in range(several)]),
        "server, one after another": lambda: [there() for _ in range(several)],
        "server, two in flight": lambda: list(threads.map(there, range(several))),
        "plain socket, bytes alone": lambda: [send() for _ in range(several)],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(timed(way, several, process))
    return found


def rows(found: dict[str, list[tuple[float, float]]], images: Tensor, batch: int) -> list[dict[str, object]]:
    """One row a way."""
    base = found["here"]
    common = {"scorer": SCORER, "images": len(images), "pixels": images.shape[-1], "images_a_request": batch,
              "megabytes": round(images.numel() / 1e6, 1), "rounds": len(base), "cpus": len(os.sched_getaffinity(0)),
              "load": round(os.getloadavg()[0], 1)}  # fmt: skip
    table = []
    for name, values in found.items():
        clock, busy = zip(*values, strict=True)
        more = [value[0] / first[0] - 1 for value, first in zip(values, base, strict=True)]
        table.append({"way": name, "ms": round(statistics.median(clock), 1), "least_ms": round(min(clock), 1),
                      "processor_ms": round(statistics.median(busy), 1),
                      "more_than_here": f"{statistics.median(more):+.1%}", **common})  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16, help="images of one request (reward.batch)")
    parser.add_argument("--output", help="file that the rows are added to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = pictures(given.images, given.side)
    command = [sys.executable, "-m", "tempflow.commands.serve", SCORER, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[-1]
        found = measure(url, server.pid, images, given.rounds, given.batch)
        lines = [json.dumps(row) for row in rows(found, images, given.batch)]
    finally:
        server.kill()
    print(*lines, sep="\n")
    if given.output:
        with open(given.output, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
