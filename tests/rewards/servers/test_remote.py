"""Scorers on servers: nothing lost and nothing scored twice, whatever the server does."""

import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import aiohttp
import pytest
import torch
from rewards.servers.test_wire import garbled, mutated
from scorer_faults import FAULTS, ROOT, bright, post, running, same, serving, survive, work

from tempflow.commands.serve import main
from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.rollout import FinishedBranches
from tempflow.prompts import Prompt, read_prompts
from tempflow.rewards.panel import load_panels
from tempflow.rewards.scorer import Scorer, load_scorer
from tempflow.rewards.servers.fleet import Fault, Fleet, Terms
from tempflow.rewards.servers.server import Bodies
from tempflow.rewards.servers.wire import Malformed, Request, pack_answer, pack_request
from tempflow.settings.fields import RewardConfig

TERMS = Terms(requests=4, timeout=5, patience=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faulty():
    with running(str(ROOT / "tests" / "support" / "scorer_faults.py"), "serve") as (_, url):
        yield url


@pytest.fixture(scope="module")
def digits():
    with serving("digits", "digits_gold", "--max-images", "200", "--max-mib", "1", "--max-prompt", "100",
                 TEMPFLOW_SCORER_TOKEN="secret") as (_, url):  # fmt: skip
        yield url


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_lose_nothing_and_score_nothing_twice(faulty, fault):
    right, seen, _ = survive(faulty, fault, times=2, timeout=1.5)
    assert right and seen["scored"] == 23  # what was scored before the answer got lost is not scored again
    assert seen["seen"] == 6 + 2 * (fault != "answer sent three times") and not seen["elsewhere"]


def test_rewards_from_a_server_are_those_from_here(digits):
    """Bit for bit, in order, in requests of several sizes and from several threads."""
    prompts = read_prompts("tempflow:digits/prompts/train.jsonl", "prompts.train")[:300]
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fleet = Fleet([digits], TERMS, "secret")
    assert fleet.survey() == {"digits", "digits_gold"}
    with ThreadPoolExecutor(3) as threads:
        for batch in (7, 128):
            expected = load_scorer("reward.name", "digits", batch)(images, prompts)
            found = list(threads.map(lambda _, b=batch: fleet.score("digits", images, prompts, b), range(3)))
            assert all(torch.equal(scores, expected) for scores in found)


def test_what_a_scorer_refuses_stops_at_once(digits):
    images, prompts, _ = work(2)
    with pytest.raises(BadInput, match=r"digits: the scorer refuses its input.*grids") as caught:
        Fleet([digits], TERMS, "secret").score("digits", images, prompts, 2)
    assert caught.value.field == "reward.servers"


def test_the_token_is_asked_for(digits):
    for token in (None, "secre", "secret2"):
        with pytest.raises(BadInput, match=r"token.*TEMPFLOW_SCORER_TOKEN"):
            Fleet([digits], TERMS, token).survey()


def send(url: str, body: bytes | None, **headers: str) -> int:
    headers = {"Authorization": "Bearer secret"} | headers
    request = urllib.request.Request(f"{url}/score", data=body, headers=headers, method="POST")
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_server_keeps_its_limits(digits):
    images, prompts, _ = work(2)
    pack = lambda *values: b"".join(pack_request(Request("i", *values)))  # noqa: E731
    assert send(digits, pack("digits", images, prompts)) == 422
    assert send(digits, pack("other", images, prompts)) == 404
    assert send(digits, b"x" * (2**20 + 1)) == 413
    assert send(digits, pack("digits", images[:1].repeat(201, 1, 1, 1), prompts[:1] * 201)) == 400
    assert send(digits, pack("digits", images[:1], [Prompt("x" * 101)])) == 400
    assert send(digits, b"", Authorization="Bearer wrong") == 401
    assert send(digits, b"not safetensors") == 400


def test_garbage_through_the_socket_leaves_a_server_well(digits):
    """300 spoilt requests, and spoilt HTTP; then it still scores."""
    dice, (images, prompts, _) = random.Random(3), work(3)
    whole = b"".join(pack_request(Request("i", "digits", images, prompts)))
    codes = {send(digits, bytes(garbled(dice, whole))) for _ in range(300)}
    assert codes <= {200, 400, 404, 422} and 400 in codes
    host, port = digits.removeprefix("http://").split(":")
    for _ in range(100):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(dice.randbytes(dice.randrange(1, 400)) + b"\r\n\r\n")
    assert Fleet([digits], TERMS, "secret").survey() == {"digits", "digits_gold"}


def test_memory_of_a_request_is_used_again_only_when_nobody_holds_its_images():
    bodies = Bodies()
    first = bodies.take(12)
    first[:] = b"x" * 12
    held = torch.frombuffer(first, dtype=torch.uint8)[6:]
    del first
    bodies.take(12)[:] = bytes(12)
    assert held.tolist() == [ord("x")] * 6 and len(bodies.buffers) == 2
    del held
    for size in (12, 5, 0):
        assert len(bodies.take(size)) == size and len(bodies.buffers) == 2
    views = [bodies.take(3) for _ in range(20)]
    assert len(bodies.buffers) <= 4 and len({id(view.obj) for view in views}) == 20


def test_garbage_through_the_socket_is_a_fault_or_the_right_answer():
    """300 spoilt HTTP answers to the trainer's client: nothing but faults, refusals and scores."""
    dice, (images, prompts, _) = random.Random(4), work(3)
    request, scores = Request("i", "bright", images, prompts), torch.tensor([0.5, 1.5, float("nan")])
    body = pack_answer(request, scores)
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fleet = Fleet([f"http://127.0.0.1:{listener.getsockname()[1]}"], TERMS)
        right = 0
        for _ in range(300):
            answer = threading.Thread(target=answer_once, args=(listener, bytes(mutated(dice, whole))))
            answer.start()
            try:
                found = fleet._run(fleet._attempt(fleet.servers[0], request, 5))
                right += 1
                assert found.shape == (3,) and not found.isinf().any()
            except (Fault, Malformed, OSError, aiohttp.ClientError):
                pass
            answer.join(10)
        assert 3 < right < 290


def answer_once(listener: socket.socket, answer: bytes) -> None:
    line, _ = listener.accept()
    with line:
        line.recv(2**20)
        line.sendall(answer)


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "::"], ["--host", "example.org"]])
def test_other_machines_need_a_token(arguments, capsys, monkeypatch):
    monkeypatch.delenv("TEMPFLOW_SCORER_TOKEN", raising=False)
    assert main(["digits", "--port", "0", *arguments]) == 2
    assert "--token-file" in capsys.readouterr().err


def test_a_server_says_what_is_wrong_with_its_arguments(capsys, tmp_path):
    (tmp_path / "token").write_text("two words\n")
    for arguments, words in ((["no_such"], "no such scorer"), (["digits", "--option", "pth=1"], "no such option"),
                             (["digits", "--device", "gpu"], "no device of torch"),
                             (["digits", "--token-file", str(tmp_path / "token")], "one word"),
                             (["digits", "--host", "127.0.0.1", "--port", "70000"], "port"),
                             (["digits", "--requests", "0"], "--requests=0: must be above 0")):  # fmt: skip
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_server_killed_amid_a_batch_is_missed_until_it_is_back(tmp_path):
    (tmp_path / "slow_scorer.py").write_text(
        "import time\nfrom scorer_faults import bright\n"
        "def bright_slowly(images, prompts):\n    time.sleep(0.15)\n    return bright(images, prompts)\n"
    )
    images, prompts, expected = work(40)
    name, found = "slow_scorer:bright_slowly", []
    with serving(name, PYTHONPATH=str(tmp_path)) as (first, url):
        fleet = Fleet([url], Terms(requests=3, timeout=5, patience=30))
        scoring = threading.Thread(target=lambda: found.append(fleet.score(name, images, prompts, 4)))
        scoring.start()
        time.sleep(0.5)
        first.kill()
        first.wait()
        assert scoring.is_alive()
        with serving(name, "--port", url.rpartition(":")[2], PYTHONPATH=str(tmp_path)):
            scoring.join(30)
    assert same(found[0], expected)


def test_a_dead_server_is_left_out_and_a_stopped_one_taken_back(faulty):
    """Two servers: the second stops answering (a real hang), then goes on and gets work again."""
    images, prompts, expected = work()
    with running(str(ROOT / "tests" / "support" / "scorer_faults.py"), "serve") as (second, url):
        fleet = Fleet([faulty, url], Terms(requests=6, timeout=2, patience=60))
        for address in (faulty, url):
            post(f"{address}/fault?name=500&times=0")  # counts anew
        assert same(fleet.score("bright", images, prompts, 2), expected)
        shares = [post(f"{address}/calls")["seen"] for address in (faulty, url)]
        assert sum(shares) == 12 and min(shares) >= 3  # the work is spread
        second.send_signal(signal.SIGSTOP)
        assert same(fleet.score("bright", images, prompts, 2), expected)
        assert [server.well for server in fleet.servers] == [True, False]
        second.send_signal(signal.SIGCONT)
        until = time.monotonic() + 30
        while not all(server.well for server in fleet.servers) and time.monotonic() < until:
            assert same(fleet.score("bright", images, prompts, 2), expected)
        assert all(server.well for server in fleet.servers)


def test_patience_ends(faulty):
    images, prompts, _ = work()
    fleet = Fleet([faulty, "http://127.0.0.1:9"], Terms(requests=6, timeout=5, patience=0.5))
    post(f"{faulty}/fault?name=500&times=1000")
    start = time.perf_counter()
    with pytest.raises(BadInput, match=r"reward\.patience=0\.5 s.*500 Internal Server Error oops|Connect call failed"):
        fleet.score("bright", images, prompts, 2)
    assert 0.4 < time.perf_counter() - start < 10


def test_chunks_of_the_score_queue_are_in_flight_together(faulty, toy):
    """Five chunks of the sampler, sent to a server that answers none before all have arrived."""
    fleet, prompts = Fleet([faulty], Terms(requests=5, timeout=10, patience=10)), [Prompt("1"), Prompt("2")]
    remote = Scorer("reward.name", "bright", partial(fleet.score, "bright", batch=2), 2**31, parallel=5)
    scores = ScoreQueue(toy, remote, 2, PhaseClock(toy.device), overlap=True)
    post(f"{faulty}/fault?name=meet&times=5")
    latents = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(0))
    for place, part in enumerate(latents.split(2)):
        scores.submit(FinishedBranches(part, [0, 1], torch.arange(2 * place, 2 * place + 2)), prompts)
    assert same(scores.collect(), Scorer("r", "bright", bright, 2)(toy.decode(latents), prompts * 5))
    assert post(f"{faulty}/calls")["seen"] == 5


def test_panels_mix_servers_and_scorers_here(digits, monkeypatch):
    """What the servers serve is scored there, the rest here; several weighted rewards, each in its row."""
    monkeypatch.setenv("TEMPFLOW_SCORER_TOKEN", "secret")
    config = RewardConfig(name={"digits": 1.0, "scorer_faults:zero": 0.5}, gold=["digits_gold"], servers=[digits])
    rewards, gold = load_panels(config, 128, CPU)
    assert [scorer.parallel for scorer in (*rewards.scorers.values(), *gold.scorers.values())] == [8, 0, 8]
    assert list(rewards.scorers) == ["digits", "zero"] and rewards.parallel == 8
    prompts = read_prompts("tempflow:digits/prompts/test.jsonl", "prompts.test")[:5]
    images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    found = rewards(images, prompts)
    assert torch.equal(found[0], load_scorer("reward.name", "digits", 128)(images, prompts)) and not found[1].any()
    assert torch.equal(rewards.total(found), found[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "other:score"}, "serve digits, digits_gold, not other:score"),
        ({"options": {"digits": {"path": "x"}}}, "give its options there"),
        ({"gold": ["digits_gold", "digits_gold"]}, "twice"),
        ({"gold": "nowhere:score"}, "cannot be imported"),
    ],
)
def test_wrong_panels_are_refused(digits, monkeypatch, changes, words):
    monkeypatch.setenv("TEMPFLOW_SCORER_TOKEN", "secret")
    with pytest.raises(BadInput, match=words):
        load_panels(RewardConfig(**({"servers": [digits]} | changes)), 128, CPU)


def test_scorers_of_one_name_keep_their_modules():
    config = RewardConfig(name={"scorer_faults:zero": 1.0, "test_remote:zero": 1.0}, gold=None)
    assert list(load_panels(config, 4, CPU)[0].scorers) == ["scorer_faults:zero", "test_remote:zero"]


def zero(images, prompts):
    return [0.0] * len(images)


def test_a_scorer_without_any_opinion_is_named():
    panel = load_panels(RewardConfig(name={"scorer_faults:zero": 1.0}, gold=[]), 4, CPU)[0]
    panel.check_opinions(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(BadInput, match=r"reward\.name=scorer_faults:zero: returned NaN for all 2 images"):
        panel.check_opinions(torch.full((1, 2), float("nan")))


def test_the_package_that_servers_need_is_named(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "tempflow.rewards.servers.fleet")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(BadInput, match=r"pip install 'tempflow\[rewards\]'"):
        load_panels(RewardConfig(servers=["http://127.0.0.1:9"]), 4, CPU)


def test_bright_is_what_it_says():
    """The tests' own scorer tells images and prompts apart, or the tests above would see nothing."""
    images, prompts, expected = work()
    assert not same(Scorer("r", "bright", bright, 4)(images.flip(0), prompts), expected)
    assert expected.isnan().sum() == 1 and len(expected.unique()) == 23
