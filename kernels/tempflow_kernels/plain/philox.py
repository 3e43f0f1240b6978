"""Counter-based noise: Philox4x32-10 and normal deviates as pure functions of keys, in plain torch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011; the Random123 library).
The element-to-counter mapping is that of torch's stateless generator (`torch.func._random`), so that one
specification serves the plain-torch, Triton and C++ implementations:

* a key is `(seed, offset)`: the Philox key is the 64 bits of `seed`, the counter is `offset + i // 4`, the lane
  `i % 4`;
* a 32-bit word r becomes the uniform `fma(float32(r), 2**-32, 2**-33)`, in (0, 1];
* words (0, 1) and (2, 3) each give a Box-Muller pair `(radius * cos, radius * sin)`.

Every sibling of a row starts at a fresh counter: sibling j uses `offset + j * ceil(elements / 4)`. The draw of a
sibling therefore depends neither on the number of siblings nor on how rows are batched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def _multiply_words(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `constant * word`. The int64 product may wrap; its 64 bits are still right."""
    product = word * constant
    return (product >> 32) & WORD, product & WORD


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of 32-bit words (0 .. 2**32 - 1), any broadcastable shapes.
        key: two int64 tensors of 32-bit words, broadcastable against the counter.
    Returns:
        four int64 tensors of 32-bit words.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply_words(MULTIPLIERS[0], word0)
        high1, low1 = _multiply_words(MULTIPLIERS[1], word2)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + WEYL[0]) & WORD, (key1 + WEYL[1]) & WORD
    return word0, word1, word2, word3


def split_words(value: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit words of int64 values, each as an int64 tensor in 0 .. 2**32 - 1."""
    return value & WORD, (value >> 32) & WORD


def _uniform(word: Tensor) -> Tensor:
    """32-bit words to fp32 uniforms in (0, 1]; float64 carries the fused multiply-add exactly."""
    return word.float().double().mul_(2.0**-32).add_(2.0**-33).float()


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two words to two independent standard normal deviates, fp32."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
    angle = (2.0 * math.pi) * _uniform(second)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal(key: Tensor, siblings: int, elements: int) -> Tensor:
    """Standard normal noise as a pure function of keys.

    Args:
        key: (R, 2) int64, `(seed, offset)` per row; any bit pattern is a valid seed.
        siblings: K, draws per row.
        elements: numbers per draw.
    Returns:
        (R, K, elements) fp32 on the device of `key`.
    """
    rows = key.shape[0]
    quads = -(-elements // 4)
    index = torch.arange(siblings * quads, device=key.device, dtype=torch.int64).view(1, siblings, quads)
    counter_low, counter_high = split_words(key[:, 1].view(rows, 1, 1) + index)
    seed_words = split_words(key[:, 0].view(rows, 1, 1))
    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    words = philox4x32((counter_low, counter_high, zero, zero), seed_words)
    lanes = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(lanes, dim=-1).view(rows, siblings, quads * 4)[..., :elements].contiguous()


def fold_key(seed: Tensor | int, *identity: Tensor | int) -> Tensor:
    """A 64-bit seed derived from a parent seed and up to four 32-bit identity numbers.

    Args:
        seed: int or int64 tensor; the parent seed.
        identity: up to four ints or int64 tensors in 0 .. 2**32 - 1, broadcastable with one another.
    Returns:
        int64 tensor of the broadcast shape: words 0 and 1 of `philox(counter=identity, key=seed)`.
    Raises:
        ValueError: more than four identity numbers.
    """
    if len(identity) > 4:
        raise ValueError(f"identity: at most 4 numbers can be folded into a key, found {len(identity)}")
    numbers = [torch.as_tensor(number, dtype=torch.int64) for number in identity]
    numbers += [torch.zeros((), dtype=torch.int64)] * (4 - len(numbers))
    parent = split_words(torch.as_tensor(seed, dtype=torch.int64))
    words = philox4x32(tuple(number & WORD for number in numbers), parent)
    return words[0] | (words[1] << 32)
