"""What a trainer and a scorer's server send each other: images as safetensors, scores as JSON. No pickle.

Request: a safetensors file. Tensor `images` U8 (B, 3, H, W); in its `__metadata__` the strings `id`, `scorer` and
`prompts` (JSON, a list of [text, metadata]). It is written and read here rather than by the library, which would copy
the images several times. Answer: JSON, `{"id": ..., "scorer": ..., "scores": [number or null, ...]}`; null is NaN, and
the numbers are float32 in full: each survives the way there and back bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempflow.prompts import Prompt
from tempflow.rewards.servers.limits import Limits

HEADER_BYTES = 16 * 2**20
"""Longest header of a request, which holds its prompts and their metadata."""

ANSWER_BYTES = 4096
"""Longest answer, apart from SCORE_BYTES for each image."""

SCORE_BYTES = 32
"""A number of an answer takes at most 24 characters, a comma and a space."""


class Malformed(ValueError):
    """Bytes that are no request, or no answer to the request that was sent."""


@dataclass(frozen=True)
class Request:
    """Images to score, under an id that stays the same however often they have to be sent."""

    id: str
    scorer: str
    images: Tensor
    """uint8 (B, 3, H, W)"""
    prompts: Sequence[Prompt]


def pack_request(request: Request) -> tuple[bytes, memoryview]:
    """Header and images of a request, which follow one another on the wire; the images are not copied."""
    images = request.images.contiguous()
    prompts = json.dumps([[prompt.text, dict(prompt.metadata)] for prompt in request.prompts])
    header = {
        "__metadata__": {"id": request.id, "scorer": request.scorer, "prompts": prompts},
        "images": {"dtype": "U8", "shape": list(images.shape), "data_offsets": [0, images.numel()]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(images.view(-1).numpy())


def unpack_request(body: bytearray | memoryview, limits: Limits) -> Request:
    """A request from its bytes, which can be written to; the images are a view of them.

    Raises:
        Malformed: with the reason.
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(HEADER_BYTES, len(body) - 8):
        raise Malformed(f"a header of {length} bytes does not fit a body of {len(body)}")
    header = read_json(bytes(body[8 : 8 + length]))
    if not isinstance(header, dict) or header.keys() != {"__metadata__", "images"}:
        raise Malformed("the header must hold __metadata__ and the tensor images, nothing else")
    start, shape = 8 + length, _shape(header["images"], len(body) - 8 - length, limits)
    words = header["__metadata__"]
    if not isinstance(words, dict) or any(not isinstance(words.get(key), str) for key in ("id", "scorer", "prompts")):
        raise Malformed("__metadata__ must hold the strings id, scorer and prompts")
    prompts = _prompts(read_json(words["prompts"]), shape[0], limits)
    images = torch.frombuffer(body, dtype=torch.uint8, offset=start).view(shape)
    return Request(words["id"], words["scorer"], images, prompts)


def _shape(entry: Any, size: int, limits: Limits) -> tuple[int, ...]:
    """The images' shape, in agreement with the number of bytes."""
    if not isinstance(entry, dict) or entry.get("dtype") != "U8":
        raise Malformed("images must be of type U8")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or any(type(side) is not int or side < 1 for side in shape):
        raise Malformed("images must be of shape (B, 3, H, W)")
    if shape[1] != 3 or shape[0] > limits.images or max(shape[2:]) > limits.side:
        raise Malformed(f"images of shape {shape}: at most {limits.images}, of 3 channels and {limits.side} pixels")
    if math.prod(shape) != size or entry.get("data_offsets") != [0, size]:
        raise Malformed(f"images of shape {shape} in {size} bytes")
    return tuple(shape)


def _prompts(values: Any, count: int, limits: Limits) -> list[Prompt]:
    if not isinstance(values, list) or len(values) != count:
        raise Malformed(f"prompts must be a list of {count}, one for each image")
    for value in values:
        if not (isinstance(value, list) and len(value) == 2):
            raise Malformed("each prompt must be a list of its text and its metadata")
        if not (isinstance(value[0], str) and isinstance(value[1], dict)):
            raise Malformed("a prompt's text must be a string and its metadata an object")
        if len(value[0]) > limits.prompt:
            raise Malformed(f"a prompt of {len(value[0])} characters; at most {limits.prompt}")
    return [Prompt(text, metadata) for text, metadata in values]


def pack_answer(request: Request, scores: Tensor) -> bytes:
    """The answer to a request, from its scores fp32 (B,), finite or NaN."""
    values = [None if math.isnan(value) else value for value in scores.tolist()]
    return json.dumps({"id": request.id, "scorer": request.scorer, "scores": values}, allow_nan=False).encode()


def unpack_answer(body: bytes, request: Request) -> Tensor:
    """Scores fp32 (B,) from the answer to a request; NaN where the scorer has no opinion.

    Raises:
        Malformed: no JSON, another request's answer, a wrong number of scores, or one that is no finite float32.
    """
    answer = read_json(body)
    if not isinstance(answer, dict):
        raise Malformed("the answer is no JSON object")
    for name, wanted in (("id", request.id), ("scorer", request.scorer)):
        if answer.get(name) != wanted:
            raise Malformed(f"the answer belongs to another request ({name} {str(answer.get(name))[:40]!r})")
    values = answer.get("scores")
    count = len(request.images)
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else type(values).__name__
        raise Malformed(f"expected {count} scores, found {found}")
    wrong = [value for value in values if value is not None and type(value) not in (int, float)]
    if wrong:
        raise Malformed(f"a score is {str(wrong[0])[:40]!r}, no number")
    try:
        scores = torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)
    except (OverflowError, RuntimeError) as error:
        raise Malformed("a score is no float32") from error
    if torch.isinf(scores).any():
        raise Malformed("a score is no finite float32")
    return scores


def pack_refusal(request: Request, reason: str) -> bytes:
    """The answer to a request that the scorer itself refuses."""
    return json.dumps({"id": request.id, "refused": reason}).encode()


def unpack_refusal(body: bytes, request: Request) -> str:
    """Why the scorer refuses a request.

    Raises:
        Malformed: it says something else.
    """
    answer = read_json(body)
    if not isinstance(answer, dict) or answer.get("id") != request.id or not isinstance(answer.get("refused"), str):
        raise Malformed("the answer is no refusal of this request")
    return " ".join(answer["refused"].split())


def read_json(text: bytes | str) -> Any:
    """JSON values; its non-standard numbers NaN and Infinity are passed on, to be refused where a number is due.

    Raises:
        Malformed: no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not readable as JSON ({str(error)[:80]})") from error
