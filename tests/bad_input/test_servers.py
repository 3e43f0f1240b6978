"""A scorer's server among callers that talk nonsense or nothing; a trainer's client among servers that lie."""

import asyncio
import contextlib
import json
import resource
import time

import aiohttp
import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer
from tempflow.rewards.servers import door
from tempflow.rewards.servers import server as serving
from tempflow.rewards.servers.fleet import Fault, Fleet, Server, Terms
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.server import ScorerServer, serve
from tempflow.rewards.servers.wire import Malformed, Request, pack_request
from tempflow.settings.checks import longest_wait
from tempflow.settings.fields import RewardConfig

IMAGES, PROMPTS = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [Prompt("x")]
BODY = b"".join(pack_request(Request("id", "one", IMAGES, PROMPTS)))
HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


def talk(conversation, capsys, function=lambda images, prompts: [0.5], requests=2):
    """Runs `conversation(port)` beside the real server; gives what it returns and the lines that the server said."""

    async def both():
        server = ScorerServer([Scorer("scorer", "one", function, 8)], Limits(), requests, None)
        running, words = asyncio.ensure_future(serve(server, "127.0.0.1", 0)), ""
        while "http://" not in words:
            await asyncio.sleep(0.01)
            words += capsys.readouterr().out
        try:
            return await asyncio.wait_for(conversation(int(words.rsplit(":", 1)[1])), 30)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    found = asyncio.run(both())
    return found, capsys.readouterr().err.splitlines()


async def send(port: int, data: bytes) -> bytes:
    """The first line of the answer to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.readline(), 20)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def score(port: int) -> bytes:
    return (await send(port, HEAD % len(BODY) + BODY)).split()[1]


MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "a header without end": b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "a thousand headers": b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "a length of words": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    "two lengths": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "chunks that are none": b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a version of the future": b"GET /health HTTP/9.9\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_is_answered_or_closed_and_counted(capsys, name):
    """Eight times: at most a line for the first, the second, the fourth and the eighth; no traceback."""

    async def conversation(port):
        first = [await send(port, MALFORMED[name]) for _ in range(8)]
        return first, await score(port)

    (answers, then), said = talk(conversation, capsys)
    assert then == b"200" and not any(b" 200 " in answer for answer in answers)
    assert len(said) <= 4 and all(line.startswith("tempflow: ") for line in said)


def test_silent_bodies_hold_no_place(capsys, monkeypatch):
    """Twenty callers announce a body and send nothing; the two places are free all the while."""
    monkeypatch.setattr(serving, "STALL_SECONDS", 4.0)

    async def conversation(port):
        lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in lines:
            writer.write(HEAD % len(BODY))
            await writer.drain()
        begun = time.monotonic()
        status = await score(port)
        waited = time.monotonic() - begun
        late = [(await asyncio.wait_for(reader.readline(), 20)).split()[1] for reader, _ in lines]
        for _, writer in lines:
            writer.close()
        return status, waited, set(late)

    (status, waited, late), said = talk(conversation, capsys)
    assert status == b"200" and waited < 3 and late == {b"408"} and not said


def test_dripping_bodies_give_their_places_away(capsys, monkeypatch):
    """Bytes that come one at a time are slower than the slowest that is taken."""
    monkeypatch.setattr(serving, "STALL_SECONDS", 0.5)

    async def drip(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % len(BODY))
        answer = asyncio.ensure_future(reader.readline())
        for byte in BODY:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait([answer], timeout=0.1)
            if done:
                break
        writer.close()
        return (await answer).split()[1]

    async def conversation(port):
        dripping = [asyncio.ensure_future(drip(port)) for _ in range(2)]
        await asyncio.sleep(0.2)
        return await score(port), set(await asyncio.gather(*dripping))

    assert talk(conversation, capsys)[0] == (b"200", {b"408"})


def test_idle_connections_are_closed_and_limited(capsys, monkeypatch):
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(door, "MOST", 5)

    async def conversation(port):
        lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
        await asyncio.sleep(0.2)
        refused = [reader.at_eof() or reader.exception() is not None for reader, _ in lines]
        for reader, writer in lines:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()
        return sum(refused), await score(port)

    (refused, status), said = talk(conversation, capsys)
    assert refused >= 7 and status == b"200" and len(said) <= 4


@pytest.mark.parametrize(("granted", "most"), [(200, 200 - door.OWN), (door.OWN, 1), (4096, door.MOST)])
def test_connections_leave_descriptors_for_the_server_itself(granted, most):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, before[1]))
    try:
        assert door.most_connections() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_scorer_that_breaks_is_one_line(capsys):
    def breaks(images, prompts):
        raise RuntimeError("out of\nmemory")

    status, said = talk(score, capsys, function=breaks)
    assert status == b"500" and len(said) == 1 and "RuntimeError out of memory" in said[0]


def attempt(answer: bytes, seen: list[bytes]) -> None:
    """One request of a trainer's client, with a token, to a server that sends these bytes."""

    async def respond(reader, writer):
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    fleet = Fleet([], Terms(1, 5.0, 5.0), "secret")

    async def one():
        listener = await asyncio.start_server(respond, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        target = Server(url)
        try:
            await fleet._attempt(target, Request("id", "one", IMAGES, PROMPTS), 5.0)
        finally:
            listener.close()

    fleet._run(one())


def head(length: int, *more: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


GOOD = json.dumps({"id": "id", "scorer": "one", "scores": [0.5]}).encode()
LIES = {
    "a body of 100 MB": head(10**8) + b" " * 10**6,
    "a body without end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"10000\r\n"
    + b"[" * 0x10000
    + b"\r\n",
    "lists without end": head(4000) + b"[" * 4000,
    "a header without end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10**6 + b"\r\n\r\n",
    "a packed body": head(len(GOOD), "Content-Encoding: gzip") + b"\x1f\x8b" + bytes(len(GOOD) - 2),
    "a number of 3000 digits": head(3000) + b"9" * 3000,
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/elsewhere\r\nContent-Length: 0\r\n\r\n",
    "a redirect that keeps the body": b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "a redirect to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", LIES)
def test_answers_that_are_none_are_a_fault(name):
    """The token goes to the server that was named, once, and nowhere else."""
    seen = []
    with pytest.raises((Fault, Malformed, aiohttp.ClientError, OSError)) as caught:
        attempt(LIES[name], seen)
    assert len(seen) == 1 and b"Bearer secret" in seen[0]
    if name.startswith("a redirect"):
        assert isinstance(caught.value, Fault) and str(caught.value).startswith("30")


def asked(monkeypatch, answer, **options):
    """A judge that asks `answer(request)` once, and a fault; gives what it says."""
    httpx = pytest.importorskip("httpx")
    from tempflow.rewards.scorers.vlm_judge import VlmJudge

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = VlmJudge("m", url="http://one.test/v1", tries=1, **options)
    judge.client = httpx.Client(transport=httpx.MockTransport(answer), headers=judge.client.headers)
    with pytest.raises(BadInput) as caught:
        judge(IMAGES, PROMPTS)
    assert caught.value.field.endswith("vlm_judge.url")
    return caught.value.hint


def test_a_judge_follows_no_redirect_either(monkeypatch):
    """Its key is as secret as the token."""
    httpx, hosts = pytest.importorskip("httpx"), []

    def answer(request):
        hosts.append(request.url.host)
        return httpx.Response(302, headers={"Location": "http://other.test/"})

    assert "302" in asked(monkeypatch, answer) and hosts == ["one.test"]


def drips(seen):
    while True:
        seen.append(1)
        time.sleep(0.02)
        yield b" "


def floods(seen):
    while True:
        seen.append(2**16)
        yield b" " * 2**16


@pytest.mark.parametrize(("body", "headers", "most", "words"), [
    (floods, {}, 2**20 + 2**16, "bytes"), (drips, {}, 100, "0.3 s"),
    (floods, {"Content-Encoding": "gzip"}, 0, "packed"),
    (lambda seen: iter([b"[" * 10**5]), {}, 0, "no chat completion"),
], ids=["flood", "drip", "packed", "deep"])  # fmt: skip
def test_a_judges_answers_have_an_end(monkeypatch, body, headers, most, words):
    httpx, seen = pytest.importorskip("httpx"), []

    def answer(request):
        return httpx.Response(200, headers=headers, content=body(seen))

    assert words in asked(monkeypatch, answer, timeout=0.3) and sum(seen) <= most


def test_waits_have_an_end():
    """A patience that no clock can count is refused where settings are read; the longest one can be counted."""
    assert longest_wait(RewardConfig(timeout=1e8, patience=1e8)) < 1e9
