"""The judge behind an API, against a small server on this machine."""

import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.scorers.vlm_judge import number_in

IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).mul(20).repeat(1, 3, 8, 8)
PROMPTS = [Prompt(f"grey {level}") for level in range(4)]


class Server(ThreadingHTTPServer):
    """Answers each chat with what `reply(body, turn)` says: a text, a status, or a raw body."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.bodies, self.headers, self.lock = reply, [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            turn = sum(one["messages"] == body["messages"] for one in self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
        reply = self.server.reply(body, turn) if self.path == "/v1/chat/completions" else 404
        status, raw = (reply, b"describe_layers so") if isinstance(reply, int) else (200, reply)
        if isinstance(raw, str):
            raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": raw}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server, **options):
    options = {"url": server.url, "model": "eye", "pause": 0.001} | options
    return load_scorer("reward.name", "vlm_judge", 8, options)


def grey_of(body):
    """The level of the picture in a question, from its PNG; all pixels must agree."""
    picture, text = body["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and text["type"] == "text"
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert levels.shape == (8, 8, 3) and levels.min() == levels.max()
    return int(levels.max()) // 20, text["text"]


def test_each_picture_is_asked_about_with_its_prompt(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")

    def reply(body, turn):
        level, text = grey_of(body)
        return f"I think so.\nScore: {2 * level + 1}/10" if f"grey {level}" in text else "Score: 0"

    server = serve(reply)
    scorer = judge(server, key="MY_KEY")
    assert scorer(IMAGES, PROMPTS).tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert scorer.parallel > 0  # so the sampler need not wait for it
    assert {body["model"] for body in server.bodies} == {"eye"} and len(server.bodies) == 4
    assert {body["temperature"] for body in server.bodies} == {0.0}
    assert {header["Authorization"] for header in server.headers} == {"Bearer secret"}


def test_scale_and_question_are_the_users(serve):
    server = serve(lambda body, turn: "4")
    scores = judge(server, low=1, high=5, question="{prompt}? {low}-{high}")(IMAGES[:1], [Prompt("a {low} cat")])
    assert scores.tolist() == [0.75] and grey_of(server.bodies[0])[1] == "a {low} cat? 1-5"


def test_trouble_that_passes_is_sat_out(serve):
    server = serve(lambda body, turn: (503, 429, "Score: 5")[turn])
    assert judge(server)(IMAGES[:2], PROMPTS[:2]).tolist() == [0.5, 0.5]
    assert len(server.bodies) == 6


def test_answers_without_a_number_are_asked_again_then_nan(serve, caplog):
    def reply(body, turn):
        level, _ = grey_of(body)
        return ("no idea", "11 of 10", "no idea", "Score: 7")[turn] if level else "I cannot say"

    server = serve(reply)
    scores = judge(server, tries=4)(IMAGES[:2], PROMPTS[:2])
    assert scores[0].isnan() and scores[1] == pytest.approx(0.7)
    assert "no number in 'I cannot say' after 4 tries" in caplog.text
    with pytest.raises(BadInput, match=r"vlm_judge\.model=eye: no answer held a number from 0 to 10; .*I cannot say"):
        judge(server, tries=2)(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize(("reply", "words"), [
    (lambda body, turn: 500, r"url=http.*: no answer in 2 tries \(Busy status 500\)"),
    (lambda body, turn: 401, "the server refuses with status 401: describe_layers so"),
    (lambda body, turn: b"<html>", "the answer is no chat completion: <html>"),
    (lambda body, turn: b'{"choices": []}', "the answer is no chat completion"),
])  # fmt: skip
def test_trouble_that_stays_is_told(serve, reply, words):
    with pytest.raises(BadInput, match=words):
        judge(serve(reply), tries=2)(IMAGES[:1], PROMPTS[:1])


def test_absent_server_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    scorer = load_scorer("reward.name", "vlm_judge", 8, {"url": url, "model": "eye", "tries": 2, "pause": 0.001})
    with pytest.raises(BadInput, match=r"vlm_judge\.url=http.*no answer in 2 tries \(ConnectError.*server running"):
        scorer(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize(("options", "words"), [
    ({}, r"vlm_judge\.model=None: this scorer needs it"),
    ({"model": "eye", "question": "How good?"}, r"must hold \{prompt\}"),
    ({"model": "eye", "low": 3, "high": 3}, "must be above low=3"),
    ({"model": "eye", "url": "http://a b:x"}, r"vlm_judge\.url=.*no usable address"),
    ({"model": "eye", "url": "localhost:8000/v1"}, r"vlm_judge\.url=.*http"),
    ({"model": "eye", "tries": 0}, r"vlm_judge\.tries=0"),
])  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(BadInput, match=words):
        load_scorer("reward.name", "vlm_judge", 8, options)


@pytest.mark.parametrize(("answer", "value"), [
    ("7", 7), ("Score: 7", 7), ("**Score:** 8.5", 8.5), ("Rating is 3.", 3), ("7/10", 7), ("8 out of 10", 8),
    ('{"score": 6, "why": "2 dogs"}', 6), ("There are 3 dogs. Final Score: 4", 4), ("Score: 2. No, score: 9", 9),
    ("<think>score: 1</think>Score: 10", 10), ("<think>score: 1", None), ("The sky is blue", None), ("Score: 12", None),
    ("-1", None), ("0", 0), ("between 2 and 5", 5), ("95%", None), ("v2.5b", None), ("", None), ("Score: ten", None),
])  # fmt: skip
def test_numbers_in_answers(answer, value):
    assert number_in(answer, 0, 10) == value
