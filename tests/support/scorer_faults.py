"""A real scorer's server that goes wrong on demand. `python tests/support/scorer_faults.py` prints the table of faults.

`python tests/support/scorer_faults.py serve` starts the server of `commands/serve.py` with one scorer, `bright`, and
in front of it a middleware that spoils the next answers in the way that `POST /fault?name=...&times=...` asks for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from aiohttp import web

from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer
from tempflow.rewards.servers.fleet import Fleet, Terms
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.server import ScorerServer, serve

ROOT = Path(__file__).resolve().parents[2]
calls, meeting = {"scored": 0, "seen": 0, "elsewhere": 0}, {"there": 0}


def bright(images, prompts):
    """Depends on image and prompt, and has no opinion of prompts called `none`."""
    calls["scored"] += len(images)
    texts = [float("nan") if prompt.text == "none" else float(prompt.text) / 7 for prompt in prompts]
    return images.float().mean((1, 2, 3)) + torch.tensor(texts)


def zero(images, prompts):
    return [0.0] * len(images)


async def forever(request, answer):
    await asyncio.sleep(3600)


async def abort(request, answer):
    request.transport.abort()


async def drip(request, answer):
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


async def drip_head(request, answer):
    request.transport.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        request.transport.write(b"x")
        await asyncio.sleep(0.01)


async def half(request, answer):
    request.transport.write(head(len(answer)) + answer[: len(answer) // 2])
    await asyncio.sleep(0.02)
    request.transport.abort()


async def short(request, answer):
    request.transport.write(head(len(answer) + 100) + answer)
    await asyncio.sleep(0.02)
    request.transport.close()


async def twice(request, answer):
    request.transport.write(2 * (head(len(answer)) + answer))
    await asyncio.sleep(0.02)


async def endless(request, answer):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"1" * 2**16)


async def no_http(request, answer):
    request.transport.write(os.urandom(300))
    request.transport.close()


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def says(body: bytes | str, status: int = 200, **headers: str):
    async def spoil(request, answer):
        return web.Response(body=body, status=status, headers=headers)

    return spoil


def changed(change):
    """An answer with other values in its JSON."""

    async def spoil(request, answer):
        values = json.loads(answer)
        change(values)
        return web.Response(body=json.dumps(values))

    return spoil


FAULTS = {
    "hangs": forever,
    "drips its answer, a byte every 10 ms": drip,
    "drips its header": drip_head,
    "resets the connection, answer lost": abort,
    "resets the connection amid the answer": half,
    "answer shorter than announced": short,
    "answer sent three times": twice,
    "answer without end": endless,
    "no HTTP": no_http,
    "garbage for JSON": says(b'{"id": "\xff\xfe'),
    "JSON of another kind": says("[1, 2]"),
    "gzip that is none": says(b"\x1f\x8b garbage", **{"Content-Encoding": "gzip"}),
    "a score too few": changed(lambda values: values["scores"].pop()),
    "a score too many": changed(lambda values: values["scores"].append(0.5)),
    "scores as strings": changed(lambda values: values.update(scores=[str(score) for score in values["scores"]])),
    "scores as lists": changed(lambda values: values.update(scores=[[score] for score in values["scores"]])),
    "an infinite score": changed(lambda values: values["scores"].__setitem__(0, float("inf"))),
    "a score beyond float32": changed(lambda values: values["scores"].__setitem__(0, 1e39)),
    "true for a score": changed(lambda values: values["scores"].__setitem__(0, True)),
    "another request's id": changed(lambda values: values.update(id="0" * 32)),
    "another scorer's answer": changed(lambda values: values.update(scorer="other")),
    "a refusal of another request": says('{"id": "0", "refused": "no"}', 422),
    "500": says("oops", 500),
    "503, then well": says('{"error": "busy"}', 503),
    "401": says('{"error": "token"}', 401),
    "404": says('{"error": "no scorer"}', 404),
    "413": says('{"error": "too large"}', 413),
    "redirects elsewhere": says("", 302, Location="/elsewhere"),
    "204, no content": says("", 204),
}
"""fault -> what the server does instead of answering, though it has scored by then."""


async def meet(request, answer):
    """Answers none before five are there."""
    meeting["there"] += 1
    while meeting["there"] < 5:
        await asyncio.sleep(0.005)


async def slow(request, answer):
    """Answers rightly, but late."""
    await asyncio.sleep(0.25)


OTHERS = {"meet": meet, "slow": slow}


class FaultyServer(ScorerServer):
    """The real server; its next `times` answers are spoilt by `fault`."""

    fault, times = None, 0

    def application(self) -> web.Application:
        app = super().application()
        app.middlewares.insert(0, self.spoil)
        return app

    @web.middleware
    async def spoil(self, request, handler):
        if request.path == "/fault":
            self.fault = (FAULTS | OTHERS)[request.query["name"]]
            self.times, meeting["there"] = int(request.query["times"]), 0
            calls.update(scored=0, seen=0, elsewhere=0)
            return web.Response()
        if request.path == "/elsewhere":
            calls["elsewhere"] += 1
            return web.Response()
        if request.path == "/calls":
            return web.json_response(calls)
        response = await handler(request)
        calls["seen"] += request.path == "/score"
        if request.path == "/health" or not self.times:
            return response
        self.times -= 1
        return await self.fault(request, response.body) or response


@contextmanager
def running(*command: str, **environment: str):
    """A server process; gives it and its address. It is killed at the end."""
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), environment.pop("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=variables)
    try:
        words = process.stdout.readline().split()
        assert words, "the server did not start"
        yield process, words[-1]
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)
        process.stdout.close()


def serving(*arguments: str, **environment: str):
    """The server of the package, on a free port unless the arguments name one."""
    port = () if "--port" in arguments else ("--port", "0")
    return running("-m", "tempflow.commands.serve", *arguments, *port, **environment)


def post(url: str) -> dict:
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10) as answer:
        return json.loads(answer.read() or b"{}")


def work(count: int = 23):
    """Images and prompts, and what `bright` says of them; one has no score."""
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("none" if number == 5 else str(number)) for number in range(count)]
    return images, prompts, Scorer("reward.name", "bright", bright, 4)(images, prompts)


def same(found, expected) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def survive(url: str, fault: str, times: int = 3, timeout: float = 0.3) -> tuple[bool, dict, float]:
    """Scores 23 images in 6 requests while the server fails; whether all are right, what it saw, and seconds.

    Args:
        timeout: seconds; if the server is busy for so long without being asked to fail, it sees more requests.
    """
    images, prompts, expected = work()
    fleet = Fleet([url], Terms(requests=3, timeout=timeout, patience=60))
    post(f"{url}/fault?" + urllib.parse.urlencode({"name": fault, "times": times}))
    start = time.perf_counter()
    found = fleet.score("bright", images, prompts, 4)
    return same(found, expected), post(f"{url}/calls"), time.perf_counter() - start


def table() -> None:
    with running(__file__, "serve") as (_, url):
        print("| the server, three times | requests it saw | images it scored | all right | s |\n|---|---|---|---|---|")
        for fault in FAULTS:
            right, seen, seconds = survive(url, fault)
            print(f"| {fault} | {seen['seen']} | {seen['scored']} | {'yes' if right else 'NO'} | {seconds:.1f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        logging.disable()  # the server's words about what the faults do to it
        faulty = FaultyServer([Scorer("scorer", "bright", bright, 512)], Limits(), 16, None)
        asyncio.run(serve(faulty, "127.0.0.1", 0))
    else:
        table()
