"""Scorers on other machines: batches spread over servers, sent again until each is scored, once.

A request keeps its id and its place among the results however often it is sent, so that nothing is lost and nothing
counts twice. A server that fails is left out until its `/health` says that it is well; it is asked after 0.1 s, and
ever more seldom. All waiting happens in one thread with an event loop.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.common.tensors import chunks
from tempflow.prompts import Prompt
from tempflow.rewards.servers import wire
from tempflow.rewards.servers.wire import ANSWER_BYTES, SCORE_BYTES, Malformed, Request, read_json

try:
    import aiohttp
except ImportError as error:
    hint = "servers need aiohttp, which is not installed: pip install 'tempflow[rewards]'"
    raise BadInput("reward.servers", None, hint) from error

Result = TypeVar("Result")
PIECE = 2**20
"""Bytes handed to the socket at once."""

HEALTH_SECONDS = 5.0
"""How long a server may think about its health."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a failed server is asked for its health: doubled with each failure, +-50 % at random."""

LOOK = 0.02
"""Seconds between two looks for a server that is well, while there is none."""


class Fault(Exception):
    """An attempt that came to nothing; another may succeed."""


@dataclass
class Server:
    """One server as the trainer sees it."""

    url: str
    scorers: frozenset[str] = frozenset()
    """what it serves, as of its last health check"""
    well: bool = False
    in_flight: int = 0
    failures: int = 0
    """since its last good answer"""
    ask_at: float = 0.0
    """when to ask for its health, monotonic seconds"""
    fault: str = "not asked yet"
    asking: asyncio.Task[None] | None = field(default=None, repr=False)

    def failed(self, fault: str) -> None:
        """Leaves the server out until a health check says otherwise."""
        self.fault = fault
        if self.well:
            say(f"{self.url} is left out for now ({fault})", everywhere=True)
        if self.well or self.asking is not None:
            self.failures += 1
        self.well = False
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(max(self.failures - 1, 0), 20))
        self.ask_at = time.monotonic() + pause * random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class Terms:
    """How servers are used."""

    requests: int
    """in flight at once, over all servers"""
    timeout: float
    """seconds for one attempt"""
    patience: float
    """seconds from a request's first failure until the run stops"""


class Fleet:
    """The servers of a run. Its methods may be called from any thread, and block."""

    def __init__(self, urls: Sequence[str], terms: Terms, token: str | None = None):
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.terms = terms
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.given_up: BadInput | None = None
        self.loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self.loop.run_forever, name="scorer servers", daemon=True)
        thread.start()
        self.session, self.free = self._run(_open(terms))
        weakref.finalize(self, _close, thread, self.loop, self.session)

    def score(self, scorer: str, images: Tensor, prompts: Sequence[Prompt], batch: int) -> Tensor:
        """(B, 3, H, W) uint8 images and B prompts -> (B,) fp32 in their order, `batch` images a request.

        Raises:
            BadInput: a request found no answer within the patience.
            BadInput: the scorer refuses its input.
        """
        requests = [
            Request(uuid.uuid4().hex, scorer, images[part], prompts[part]) for part in chunks(len(images), batch)
        ]
        return torch.cat(self._run(_together([self._persist(request) for request in requests])))

    def survey(self) -> frozenset[str]:
        """The scorers that the servers serve; waits for a first server as long as the patience allows.

        Raises:
            BadInput: none answers.
            BadInput: one refuses the token.
        """
        return self._run(self._survey())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _survey(self) -> frozenset[str]:
        until = time.monotonic() + self.terms.patience
        while True:
            await asyncio.gather(*(self._ask(server) for server in self.servers if not server.well))
            if any(server.fault.startswith("401 ") for server in self.servers if not server.well):
                hint = "a server refuses the token; give it by reward.token_file or TEMPFLOW_SCORER_TOKEN"
                raise BadInput("reward.servers", self._names(), hint)
            if any(server.well for server in self.servers):
                return frozenset().union(*(server.scorers for server in self.servers))
            if time.monotonic() > until:
                raise self._give_up(None)
            await asyncio.sleep(FIRST_PAUSE)

    async def _persist(self, request: Request) -> Tensor:
        """The scores of one request, sent until there is an answer."""
        until = None
        async with self.free:
            while True:
                server = await self._choose(request.scorer, until)
                left = math.inf if until is None else max(until - time.monotonic(), LOOK)
                seconds = min(self.terms.timeout, left)
                server.in_flight += 1
                try:
                    return await self._attempt(server, request, seconds)
                except (Fault, Malformed, aiohttp.ClientError, OSError) as error:
                    server.failed(_words(error, seconds))
                    until = time.monotonic() + self.terms.patience if until is None else until
                finally:
                    server.in_flight -= 1

    async def _choose(self, scorer: str, until: float | None) -> Server:
        """The least busy server that is well; while there is none, waits until `until`, from now on if it is None."""
        while True:
            now = time.monotonic()
            for server in self.servers:
                if not server.well and server.asking is None and now >= server.ask_at:
                    server.asking = asyncio.ensure_future(self._ask(server))
            fit = [server for server in self.servers if server.well and scorer in server.scorers]
            if self.given_up is not None:
                raise self.given_up
            until = now + self.terms.patience if until is None and not fit else until
            if until is not None and now >= until:
                raise self._give_up(scorer)
            if fit:
                return min(fit, key=lambda server: (server.in_flight, random.random()))
            await asyncio.sleep(LOOK)

    async def _ask(self, server: Server) -> None:
        """A health check."""
        seconds = min(HEALTH_SECONDS, self.terms.timeout)
        try:
            async with asyncio.timeout(seconds), self._get(server) as response:
                if response.status != 200:
                    raise Fault(f"{response.status} {response.reason}")
                names = read_json(await _read(response, 2**20))["scorers"]
            if server.failures:
                say(f"{server.url} is taken back", everywhere=True)
            server.scorers, server.well = frozenset(map(str, names)), True
        except (Fault, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            server.failed(_words(error, seconds))
        finally:
            server.asking = None

    async def _attempt(self, server: Server, request: Request, seconds: float) -> Tensor:
        """Sends a request to a server once."""
        head, images = wire.pack_request(request)
        size = {"Content-Length": str(len(head) + len(images)), "Content-Type": "application/octet-stream"}
        async with asyncio.timeout(seconds), self.session.post(
            f"{server.url}/score", data=_pieces(head, images), headers=self.headers | size, allow_redirects=False
        ) as response:
            body = await _read(response, ANSWER_BYTES + SCORE_BYTES * len(request.images))
        if response.status == 422:
            reason = wire.unpack_refusal(body, request)
            raise BadInput("reward.servers", server.url, f"{request.scorer}: {reason}")
        if response.status != 200:
            raise Fault(f"{response.status} {response.reason} {_reason(body)}".strip())
        scores = wire.unpack_answer(body, request)
        server.failures = 0
        return scores

    def _get(self, server: Server) -> Any:
        return self.session.get(f"{server.url}/health", headers=self.headers, allow_redirects=False)

    def _give_up(self, scorer: str | None) -> BadInput:
        """The error that ends the run, now also for all that still wait."""
        faults = "; ".join(
            f"{server.url}: {f'serves no {scorer}' if server.well and scorer not in server.scorers else server.fault}"
            for server in self.servers
        )
        hint = f"no answer within reward.patience={self.terms.patience:g} s ({faults}); is the server up?"
        self.given_up = BadInput("reward.servers", self._names(), hint)
        return self.given_up

    def _names(self) -> str:
        return f"[{', '.join(server.url for server in self.servers)}]"


async def _open(terms: Terms) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
    connector = aiohttp.TCPConnector(limit=0)
    forever = aiohttp.ClientTimeout(total=None)  # attempts have their own
    jar = aiohttp.DummyCookieJar()
    session = aiohttp.ClientSession(connector=connector, timeout=forever, auto_decompress=False, cookie_jar=jar)
    return session, asyncio.Semaphore(terms.requests)


def _close(thread: threading.Thread, loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    """Ends the connections, then the thread."""
    closing = asyncio.run_coroutine_threadsafe(session.close(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if threading.current_thread() is not thread:
        thread.join(5)


async def _together(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all; where one fails, the others end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _pieces(head: bytes, images: memoryview) -> AsyncIterator[bytes | memoryview]:
    yield head
    for start in range(0, len(images), PIECE):
        yield images[start : start + PIECE]


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body of an answer."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit:
            raise Fault(f"an answer of more than {limit} bytes")
    return bytes(body)


def _words(error: Exception, seconds: float) -> str:
    """One line about a failed attempt."""
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    text = " ".join(f"{getattr(error, 'os_error', error)}".split())[:200]
    return "".join(sign if sign.isprintable() else "?" for sign in text) or type(error).__name__


def _reason(body: bytes) -> str:
    """What a server says about its refusal, if it says so in its own words."""
    try:
        return str(read_json(body)["error"])
    except (Malformed, KeyError, TypeError):
        return ""
