"""What trainer and server send each other: exact, readable by the safetensors library, and no garbage gets through."""

import json
import random

import pytest
import safetensors.torch
import torch

from tempflow.prompts import Prompt
from tempflow.rewards.scorer import Scorer
from tempflow.rewards.servers import wire
from tempflow.rewards.servers.server import _work
from tempflow.rewards.servers.wire import (
    Limits,
    Malformed,
    Request,
    pack_answer,
    pack_refusal,
    pack_request,
    unpack_answer,
    unpack_refusal,
    unpack_request,
)

IMAGES = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a red cube", {"grids": [[1, None, 2, 3]]}), Prompt("größer \ud800 名", {}), Prompt("", {"x": 1.5})]
REQUEST = Request("an-id", "digits", IMAGES, PROMPTS)


def body(request=REQUEST) -> bytearray:
    head, images = pack_request(request)
    return bytearray(head) + images


def test_requests_arrive_as_they_were_sent():
    there = unpack_request(body(), Limits())
    assert (there.id, there.scorer, there.prompts) == ("an-id", "digits", PROMPTS)
    assert torch.equal(there.images, IMAGES) and there.images.dtype == torch.uint8
    turned = Request("i", "s", IMAGES.permute(0, 1, 3, 2), PROMPTS)
    assert torch.equal(unpack_request(body(turned), Limits()).images, turned.images)


def test_requests_are_safetensors():
    """The library reads what is written here, and what it writes is read here."""
    assert torch.equal(safetensors.torch.load(bytes(body()))["images"], IMAGES)
    prompts = json.dumps([[prompt.text, prompt.metadata] for prompt in PROMPTS])
    words = {"id": "an-id", "scorer": "digits", "prompts": prompts}
    there = unpack_request(bytearray(safetensors.torch.save({"images": IMAGES}, words)), Limits())
    assert torch.equal(there.images, IMAGES) and there.prompts == PROMPTS


def test_scores_survive_bit_for_bit():
    scores = torch.randn(10_000) * 10.0 ** torch.randint(-44, 38, (10_000,))
    scores = torch.cat((scores, torch.tensor([0.0, -0.0, 1e-45, 3.4028235e38, float("nan")])))
    scores = scores.where(~scores.isinf(), 1.0)
    request = Request("i", "s", torch.zeros(len(scores), 3, 1, 1, dtype=torch.uint8), [])
    back = unpack_answer(pack_answer(request, scores), request)
    assert torch.equal(back.view(torch.int32)[:-1], scores.view(torch.int32)[:-1]) and back[-1].isnan()


def test_a_refusal_says_why():
    assert unpack_refusal(pack_refusal(REQUEST, "no grids\nin it"), REQUEST) == "no grids in it"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(images=2), "at most 2"),
        (Limits(side=5), "5 pixels"),
        (Limits(prompt=9), "prompt of 10 characters; at most 9"),
    ],
)
def test_limits_are_kept(limits, words):
    with pytest.raises(Malformed, match=words):
        unpack_request(body(), limits)


@pytest.mark.parametrize("limit", [{"images": 3}, {"side": 6}, {"prompt": 10}])
def test_what_is_exactly_at_a_limit_is_taken(limit):
    """Three images of at most six pixels with prompts of at most ten characters; one less is refused."""
    assert len(unpack_request(body(), Limits(**limit)).prompts) == 3
    with pytest.raises(Malformed):
        unpack_request(body(), Limits(**{name: value - 1 for name, value in limit.items()}))


def test_a_header_has_a_longest_length(monkeypatch):
    whole = body()
    length = int.from_bytes(whole[:8], "little")
    monkeypatch.setattr(wire, "HEADER_BYTES", length)
    assert unpack_request(whole, Limits()).id == "an-id"
    monkeypatch.setattr(wire, "HEADER_BYTES", length - 1)
    with pytest.raises(Malformed, match=f"header of {length} bytes"):
        unpack_request(whole, Limits())


def test_a_body_that_ends_with_its_header_is_malformed():
    """Neither a header one byte longer than what follows it, nor one that leaves no image, is read beyond its end."""
    head, _ = pack_request(REQUEST)
    for longer in (0, 1):
        spoilt = bytearray((len(head) - 8 + longer).to_bytes(8, "little") + head[8:])
        with pytest.raises(Malformed, match="does not fit" if longer else "bytes"):
            unpack_request(spoilt, Limits())
    for short in (b"", b"1234567"):
        with pytest.raises(Malformed, match="does not fit"):
            unpack_request(bytearray(short), Limits())


def header(change) -> bytearray:
    """The request with another header."""
    whole = body()
    length = int.from_bytes(whole[:8], "little")
    values = json.loads(whole[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("images"),
        lambda values: values.update(more={}),
        lambda values: values["images"].update(dtype="F32"),
        lambda values: values["images"].update(shape=[3, 3, 6, 5]),
        lambda values: values["images"].update(shape=[-3, 3, -4, 6]),
        lambda values: values["images"].update(shape=[True, 3, 4, 18]),
        lambda values: values["images"].update(shape=[9, 1, 4, 6]),
        lambda values: values["images"].update(data_offsets=[8, 216]),
        lambda values: values["__metadata__"].pop("id"),
        lambda values: values["__metadata__"].update(prompts="[[]]"),
        lambda values: values["__metadata__"].update(prompts='[["a", {}]]'),
        lambda values: values["__metadata__"].update(prompts=json.dumps([["a", []]] * 3)),
        lambda values: values["__metadata__"].update(prompts="[" * 100_000),
    ],
)
def test_wrong_requests_are_refused(change):
    with pytest.raises(Malformed):
        unpack_request(header(change), Limits())


JUNK = [b'"', b"[", b"{", b"null", b"-1", b"1e999", b"NaN", b"\xff", b"\0", b"9" * 40]


def mutated(dice: random.Random, whole: bytes) -> bytearray:
    """Valid bytes after a few accidents, or plain noise."""
    if dice.random() < 0.1:
        return bytearray(dice.randbytes(dice.randrange(300)))
    spoilt = bytearray(whole)
    for _ in range(dice.randrange(1, 5)):
        place = dice.randrange(len(spoilt) + 1)
        kind = dice.randrange(5)
        if kind == 0:
            spoilt[place : place + 1] = dice.randbytes(1)
        elif kind == 1:
            del spoilt[place : place + dice.randrange(1, 40)]
        elif kind == 2:
            spoilt[place:place] = dice.choice(JUNK)
        elif kind == 3:
            other = dice.randrange(len(spoilt) + 1)
            spoilt[place:place] = spoilt[other : other + dice.randrange(1, 60)]
        else:
            spoilt[:8] = dice.randrange(2**dice.randrange(1, 65)).to_bytes(8, "little")
    return spoilt


def garbled(dice: random.Random, whole: bytes) -> bytearray:
    """A request spoilt anywhere, or in its JSON only, the rest fitting again."""
    if dice.random() < 0.3:
        return mutated(dice, whole)
    head = mutated(dice, whole[8 : -IMAGES.numel()])
    return bytearray(len(head).to_bytes(8, "little")) + head + whole[-IMAGES.numel() :]


def test_10_000_garbled_requests_are_refused_or_scored():
    """Whatever arrives, a server parses it or says Malformed; what it parses, it can score."""
    dice, whole, parsed = random.Random(1), bytes(body()), 0
    scorer = Scorer("scorer", "digits", lambda images, prompts: [float(len(prompt.text)) for prompt in prompts], 512)
    for _ in range(10_000):
        spoilt = garbled(dice, whole)
        try:
            request = unpack_request(spoilt, Limits())
        except Malformed:
            continue
        parsed += 1
        assert request.images.shape[1] == 3 and len(request.prompts) == len(request.images)
        assert _work(scorer, request)[0] == 200
    assert 100 < parsed < 9_900  # both ways were taken


def test_10_000_garbled_answers_are_refused_or_right():
    """Whatever a server says, the trainer has finite numbers or NaN, one for each image, or Malformed."""
    dice, parsed, answers = random.Random(2), 0, (unpack_answer, pack_answer(REQUEST, torch.tensor([0.25, -1.5, 3e5])))
    refusals = (unpack_refusal, pack_refusal(REQUEST, "no grids"))
    for number in range(10_000):
        unpack, whole = refusals if number % 5 == 0 else answers
        try:
            found = unpack(bytes(mutated(dice, whole)), REQUEST)
        except Malformed:
            continue
        parsed += 1
        assert isinstance(found, str) or (found.shape == (3,) and not found.isinf().any())
    assert 50 < parsed < 9_900
