"""A vision-language model as judge, over any OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted one).

Score: the number that the model answers with, mapped from [low, high] to 0..1. An answer without a number in that
range is asked for again, and at last is NaN: no opinion.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.parts.pixels import check_images
from tempflow.rewards.parts.weights import option, require

log = logging.getLogger(__name__)

QUESTION = (
    "How well does this picture show the following text, and how good is it as a picture? Text: {prompt}\n"
    "Answer with one line and nothing else: Score: N, where N is a number from {low} (worst) to {high} (best)."
)
THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)
NUMBER = r"(-?\d+(?:\.\d+)?)"
LABELLED = re.compile(rf"(?:score|rating)\W*(?:is\W*|of\W*)?{NUMBER}", re.IGNORECASE)
PLAIN = re.compile(rf"(?<![\w.]){NUMBER}(?![\w%]|\.\d)")
LARGEST = 2**20
"""bytes of an answer that are read"""


def number_in(answer: str, low: float, high: float) -> float | None:
    """The score an answer names: the last number behind "score" or "rating", else the last one that stands alone.

    Thoughts between <think> tags do not count, nor what is counted out of ("7/10" and "7 of 10" are 7). None where
    there is no number, or one outside low to high.
    """
    text = re.sub(r"(?<=\d)\s*(?:/|(?:out )?of)\s*\d+(?:\.\d+)?", "", THOUGHT.sub("", answer))
    found = LABELLED.findall(text) or PLAIN.findall(text)
    value = float(found[-1]) if found else math.nan
    return value if low <= value <= high else None


def png_url(image: Tensor) -> str:
    """A uint8 (3, H, W) image as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Busy(Exception):
    """An answer that may be better the next time."""


@dataclass
class VlmJudge:
    """Scores from 0 to 1 by a model behind an API."""

    model: str
    """name under which the server knows the model"""
    url: str = "http://localhost:8000/v1"
    """address up to and with the version; /chat/completions is added"""
    question: str = QUESTION
    """what is asked; {prompt}, {low} and {high} are filled in"""
    low: float = 0.0
    """worst score of the scale"""
    high: float = 10.0
    """best score of the scale"""
    tries: int = 5
    """how often one picture is asked about at most; between the tries 1, 2, 4, ... seconds go by"""
    parallel: int = 16
    """questions under way at once"""
    timeout: float = 120.0
    """seconds to wait for one answer"""
    max_tokens: int = 64
    """longest answer; raise it for models that think aloud"""
    key: str = "OPENAI_API_KEY"
    """environment variable that holds the server's key; without one none is sent"""
    pause: float = 1.0
    """seconds before the second try"""
    client: Any = field(init=False, repr=False)
    waits: ClassVar[int] = 2
    """calls that may be under way at once, each with `parallel` questions"""

    def __post_init__(self) -> None:
        httpx = require("vlm_judge", "httpx")
        if "{prompt}" not in self.question:
            raise BadInput(option("vlm_judge", "question"), self.question, "must hold {prompt}")
        if not self.low < self.high:
            raise BadInput(option("vlm_judge", "high"), self.high, f"must be above low={self.low}")
        key = os.environ.get(self.key)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.trouble = httpx.TransportError
        self.client = httpx.Client(timeout=self.timeout, headers=headers)
        try:
            scheme = httpx.URL(self.url).scheme
        except (httpx.InvalidURL, TypeError) as error:
            raise BadInput(option("vlm_judge", "url"), self.url, f"no usable address ({error})") from error
        if scheme not in ("http", "https"):
            raise BadInput(option("vlm_judge", "url"), self.url, "must begin with http:// or https://")
        for name in ("tries", "parallel"):
            if getattr(self, name) < 1:
                raise BadInput(option("vlm_judge", name), getattr(self, name), "must be at least 1")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """uint8 (B, 3, H, W) and B prompts -> B scores, NaN where no number was to be had.

        Raises:
            BadInput: the server cannot be reached, refuses, or answered none of the pictures with a number.
        """
        check_images(images, prompts)
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(self._score, images, [prompt.text for prompt in prompts]))
        if answers and all(isinstance(answer, str) for answer in answers):
            hint = f"no answer held a number from {self.low:g} to {self.high:g}; the first was {answers[0][:100]!r}"
            raise BadInput(option("vlm_judge", "model"), self.model, hint)
        for answer in answers:
            if isinstance(answer, str):
                log.warning("vlm_judge: no number in %r after %d tries; NaN", answer[:100], self.tries)
        return [math.nan if isinstance(answer, str) else answer for answer in answers]

    def _score(self, image: Tensor, prompt: str) -> float | str:
        """The score from 0 to 1, or the last answer if none of the tries held a number."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        text = self.question.replace("{low}", low).replace("{high}", high).replace("{prompt}", prompt)
        content = [
            {"type": "image_url", "image_url": {"url": png_url(image)}},
            {"type": "text", "text": text},
        ]
        reason = ""
        answer: str | None = None
        for turn in range(self.tries):
            if turn and answer is None:
                time.sleep(self.pause * 2 ** (turn - 1))
            try:
                answer = self._ask(content, turn)
            except (Busy, self.trouble) as error:
                reason, answer = f"{type(error).__name__} {error}".strip(), None
                continue
            value = number_in(answer, self.low, self.high)
            if value is not None:
                return (value - self.low) / (self.high - self.low)
        if answer is None:
            hint = f"no answer in {self.tries} tries ({reason}); is the server running and the address right?"
            raise BadInput(option("vlm_judge", "url"), self.url, hint)
        return answer

    def _ask(self, content: list[dict[str, Any]], turn: int) -> str:
        """One question; the first is asked at temperature 0, further ones with chance."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if turn == 0 else 0.5,
        }
        with self.client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
            answer = self._read(response)
        if response.status_code == 429 or response.status_code >= 500:
            raise Busy(f"status {response.status_code}")
        said = " ".join(answer.decode(errors="replace").split())[:200]
        if response.status_code != 200:
            hint = f"the server refuses with status {response.status_code}: {said}"
            raise BadInput(option("vlm_judge", "url"), self.url, hint)
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise BadInput(option("vlm_judge", "url"), self.url, f"the answer is no chat completion: {said}") from error

    def _read(self, response: Any) -> bytes:
        """The body of an answer, as it was sent.

        Raises:
            Busy: there is no end to it, or it is packed, and nobody knows into what it would grow.
        """
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Busy("a packed answer, which was not asked for")
        body, end = bytearray(), time.monotonic() + self.timeout
        for piece in response.iter_bytes():
            body += piece
            if len(body) > LARGEST:
                raise Busy(f"an answer of more than {LARGEST:,} bytes")
            if time.monotonic() > end:
                raise Busy(f"no whole answer within {self.timeout:g} s")
        return bytes(body)
