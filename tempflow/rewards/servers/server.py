"""Scorers as a server, so that a big one runs on another machine or GPU than the trainer.

    tempflow serve digits my_module:my_scorer --port 9000

and, for the trainer, `reward.servers=[http://127.0.0.1:9000]`. A request is scored in one call of the scorer, and each
scorer takes one request at a time while the next ones arrive. A request that is sent again (its answer was lost) gets
the answer of the first. Other machines are let in only with a token, given by `--token-file` or the environment
variable TEMPFLOW_SCORER_TOKEN; the traffic itself is plain HTTP: let it run inside a trusted network or a tunnel.
"""

from __future__ import annotations

import asyncio
import hmac
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tempflow.common.errors import BadInput
from tempflow.rewards.scorer import Scorer, ScorerFailed
from tempflow.rewards.servers.door import IDLE_SECONDS, Counted, admit, most_connections
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.wire import Malformed, Request, pack_answer, pack_refusal, unpack_request

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

STALL_SECONDS = 5.0
"""How long nothing of it may arrive; all of it arrives at SLOWEST at least, after this grace."""

SLOWEST = 2**16
"""Bytes a second."""


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
        try:
            first = await _first(request)  # who sends nothing takes no place
            async with self.free:  # the rest of the bodies of those that wait here stays with their senders
                return await self._score(request, first, size)
        except Malformed as error:
            return _error(400, str(error))
        except TimeoutError:
            return _error(408, f"the request did not arrive within {BODY_SECONDS:g} s, or stalled")
        except ScorerFailed as error:
            print(f"tempflow: {error}", file=sys.stderr, flush=True)
            return _error(500, str(error))

    async def _score(self, request: web.Request, first: bytes, size: int) -> web.Response:
        job = unpack_request(await _read(request, first, self.bodies.take(size)), self.limits)
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
    except ScorerFailed:
        raise  # and is asked again when the request comes again
    except BadInput as error:
        return 422, pack_refusal(job, error.hint)


async def _first(request: web.Request) -> bytes:
    """What of a body comes first."""
    async with asyncio.timeout(min(STALL_SECONDS, BODY_SECONDS)):
        return await request.content.readany()


async def _read(request: web.Request, first: bytes, body: memoryview) -> memoryview:
    """The body, which begins with `first`, every byte copied once.

    Raises:
        Malformed: another number of bytes.
        TimeoutError: it comes too slowly.
    """
    place, piece, begun = 0, first, asyncio.get_running_loop().time()
    async with asyncio.timeout_at(begun + min(STALL_SECONDS, BODY_SECONDS)) as limit:
        while piece and place + len(piece) <= len(body):
            body[place : place + len(piece)] = piece
            place += len(piece)
            limit.reschedule(begun + min(STALL_SECONDS + place / SLOWEST, BODY_SECONDS))
            piece = await request.content.readany()
    if place != len(body) or piece:
        raise Malformed(f"{place} of {len(body)} bytes arrived")
    return body


def _error(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


async def serve(server: ScorerServer, host: str, port: int) -> None:
    """Serves until it is cancelled."""
    counted, loop = Counted(), asyncio.get_running_loop()
    loop.set_exception_handler(counted.of_loop)
    runner = web.AppRunner(server.application(), access_log=None, auto_decompress=False, logger=counted.logger(),
                           keepalive_timeout=IDLE_SECONDS)  # fmt: skip
    await runner.setup()
    requests, most = runner.server, most_connections()
    assert requests is not None
    door = None
    try:
        door = await loop.create_server(lambda: admit(lambda: len(requests.connections), requests, most), host, port)
        name = f"[{host}]" if ":" in host else host
        print(f"tempflow: {', '.join(server.scorers)} at http://{name}:{door.sockets[0].getsockname()[1]}", flush=True)
        await asyncio.Event().wait()
    finally:
        if door is not None:
            door.close()
        await runner.cleanup()
