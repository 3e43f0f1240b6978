"""Scorers as a server, so that a big one runs on another machine or GPU than the trainer.

    python -m tempflow.rewards.servers.server digits my_module:my_scorer --port 9000

and, for the trainer, `reward.servers=[http://127.0.0.1:9000]`. A request is scored in one call of the scorer, and each
scorer takes one request at a time while the next ones arrive. A request that is sent again (its answer was lost) gets
the answer of the first. Other machines are let in only with a token, given by `--token-file` or the environment
variable TEMPFLOW_SCORER_TOKEN; the traffic itself is plain HTTP: let it run inside a trusted network or a tunnel.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tempflow.commands.score import read_device, read_options
from tempflow.common.errors import BadInput
from tempflow.rewards.scorer import SCORERS, Scorer, load_scorer
from tempflow.rewards.servers.secret import read_token
from tempflow.rewards.servers.wire import Limits, Malformed, Request, pack_answer, pack_refusal, unpack_request

try:
    from aiohttp import web
except ImportError as error:
    raise BadInput("aiohttp", None, "is not installed: pip install 'tempflow[rewards]'") from error

REMEMBERED = 1024
"""Answers that are kept for requests sent again."""

KEPT = 4
"""Bodies whose memory is kept."""

BODY_SECONDS = 120.0
"""How long a request may take to arrive."""


class Bodies:
    """Memory for the bodies of requests, used again: to get it fresh from the system costs more than to fill it."""

    def __init__(self) -> None:
        self.buffers: list[bytearray] = []

    def take(self, size: int) -> memoryview:
        """`size` bytes, free again as soon as nothing refers to them, no tensor either."""
        for buffer in self.buffers:
            if len(buffer) >= size and _is_free(buffer):
                return memoryview(buffer)[:size]
        self.buffers = [*self.buffers[-KEPT + 1 :], bytearray(max(size, 1))]
        return memoryview(self.buffers[-1])[:size]


def _is_free(buffer: bytearray) -> bool:
    """Whether no view of it lives: only then does Python let it change its length."""
    try:
        buffer.append(buffer.pop())
    except BufferError:
        return False
    return True


class ScorerServer:
    """The scorers behind the two addresses `GET /health` and `POST /score`."""

    def __init__(self, scorers: Sequence[Scorer], limits: Limits, requests: int, token: str | None):
        self.scorers = {scorer.name: (scorer, ThreadPoolExecutor(1, scorer.name)) for scorer in scorers}
        self.limits, self.token = limits, token
        self.free, self.bodies = asyncio.Semaphore(requests), Bodies()
        self.answers: OrderedDict[tuple[str, str], asyncio.Future[tuple[int, bytes]]] = OrderedDict()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._authorise])
        app.add_routes([web.get("/health", self.health), web.post("/score", self.score)])
        return app

    @web.middleware
    async def _authorise(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return _error(401, "wrong or missing token")
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        """Says which scorers are served."""
        return web.json_response({"scorers": list(self.scorers)})

    async def score(self, request: web.Request) -> web.Response:
        """Scores one request: 200 with its scores, 422 if the scorer refuses it, or another code with the reason."""
        size = request.content_length
        if size is None:
            return _error(411, "a request must say its Content-Length")
        if size > self.limits.body:
            return _error(413, f"a body of {size} bytes; at most {self.limits.body}, see reward.batch and --max-mib")
        async with self.free:  # the bodies of those that wait here stay with their senders
            return await self._score(request, size)

    async def _score(self, request: web.Request, size: int) -> web.Response:
        try:
            job = unpack_request(await _read(request, self.bodies.take(size)), self.limits)
        except Malformed as error:
            return _error(400, str(error))
        except TimeoutError:
            return _error(408, f"the request did not arrive within {BODY_SECONDS:g} s")
        if job.scorer not in self.scorers:
            return _error(404, f"no scorer {job.scorer[:80]!r} here; served are {', '.join(self.scorers)}")
        status, answer = await asyncio.shield(self._answer(job))
        return web.Response(status=status, body=answer, content_type="application/json")

    def _answer(self, job: Request) -> asyncio.Future[tuple[int, bytes]]:
        """The answer to a request, that of the first time if it was sent before and did not fail."""
        key = (job.scorer, job.id)
        known = self.answers.get(key)
        if known is None or (known.done() and known.exception() is not None):
            scorer, thread = self.scorers[job.scorer]
            known = asyncio.get_running_loop().run_in_executor(thread, _work, scorer, job)
            self.answers[key] = known
            while len(self.answers) > REMEMBERED:
                self.answers.popitem(last=False)
        return known


def _work(scorer: Scorer, job: Request) -> tuple[int, bytes]:
    """Status and body of the answer; in the scorer's own thread."""
    try:
        return 200, pack_answer(job, scorer(job.images, job.prompts))
    except BadInput as error:
        return 422, pack_refusal(job, error.mend)


async def _read(request: web.Request, body: memoryview) -> memoryview:
    """The body, every byte copied once."""
    place = 0
    async with asyncio.timeout(BODY_SECONDS):
        async for piece in request.content.iter_any():
            if place + len(piece) > len(body):
                break
            body[place : place + len(piece)] = piece
            place += len(piece)
    if place != len(body):
        raise Malformed(f"{place} of {len(body)} bytes arrived")
    return body


def _error(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="python -m tempflow.rewards.servers.server", description=__doc__.split("\n\n")[0])
    parser.add_argument("scorers", nargs="+", help=f"{', '.join(SCORERS)}, or module:attribute")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; any but a loopback needs a token")
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one; the first line printed names it")
    parser.add_argument("--token-file", help="file whose first line is the token (or set TEMPFLOW_SCORER_TOKEN)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the scorers")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the scorer; SCORER.KEY=VALUE for one of several scorers")  # fmt: skip
    parser.add_argument("--requests", type=int, default=16, help="requests taken in at once; others wait")
    parser.add_argument("--max-mib", type=float, default=defaults.body / 2**20, help="largest request in MiB")
    parser.add_argument("--max-images", type=int, default=defaults.images, help="images of a request")
    parser.add_argument("--max-prompt", type=int, default=defaults.prompt, help="characters of a prompt")
    return parser.parse_args(arguments)


def build(given: argparse.Namespace) -> ScorerServer:
    """The server that the command line asks for.

    Raises:
        BadInput: no such scorer, wrong options, or an address open to others without a token.
    """
    token = read_token("--token-file", given.token_file)
    if token is None and not _is_loopback(given.host):
        mend = "is open to other machines: give a token by --token-file or TEMPFLOW_SCORER_TOKEN, or use 127.0.0.1"
        raise BadInput("--host", given.host, mend)
    for name in ("requests", "max_mib", "max_images", "max_prompt"):
        if getattr(given, name) <= 0:
            raise BadInput(f"--{name.replace('_', '-')}", getattr(given, name), "must be above 0")
    device = read_device(given.device)
    options = read_options(given.option, given.scorers)
    scorers = [load_scorer("scorer", name, given.max_images, options.get(name), device) for name in given.scorers]
    limits = Limits(int(given.max_mib * 2**20), given.max_images, prompt=given.max_prompt)
    return ScorerServer(scorers, limits, given.requests, token)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(server: ScorerServer, host: str, port: int) -> None:
    """Serves until it is cancelled."""
    runner = web.AppRunner(server.application(), access_log=None, auto_decompress=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        name = f"[{host}]" if ":" in host else host
        print(f"tempflow: {', '.join(server.scorers)} at http://{name}:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _arguments(arguments)
    try:
        asyncio.run(serve(build(given), given.host, given.port))
    except BadInput as error:
        print(f"tempflow: {error}", file=sys.stderr)
        return 2
    except (OSError, OverflowError) as error:
        print(f"tempflow: --port={given.port}: cannot listen at {given.host} ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
