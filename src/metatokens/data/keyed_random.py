"""Randomness that is a pure function of a key and a counter: no rank, worker, batch or resume changes a draw.

These functions give the same numbers in every release; numpy's and Python's generators do not promise that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Uint64Array: TypeAlias = npt.NDArray[np.uint64]
_Choice = TypeVar("_Choice")

# SplitMix64: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", and Vigna's public-domain
# splitmix64.c, whose constants (Stafford's variant 13) these are
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_WORD_BITS = 64
_DRAWS_AT_ONCE = 128
_STEPS = np.arange(_DRAWS_AT_ONCE, dtype=np.uint64) * GOLDEN_GAMMA
_STRIDE = np.uint64(_DRAWS_AT_ONCE * int(GOLDEN_GAMMA) % (1 << _WORD_BITS))


class Purpose(IntEnum):
    """The purpose of a draw, a part of its key, so that draws for two purposes are independent.

    A number never changes its meaning; a new purpose takes the next number.
    """

    POSITIONS = 0
    """The positions of meta-tokens in a block."""
    CLAUSES = 1
    """Which ends of clauses get a meta-token."""
    SAMPLE_ORDER = 2
    DROPOUT = 3
    INSTANCE_ORDER = 4
    BATCH_ORDER = 5
    PAIR_ITEM = 6
    """Which item differs between the two texts of a minimal pair."""
    EVICTION = 7
    PASSAGE = 8
    """Where a passage begins in its text."""
    PASSAGE_INJECTION = 9
    RECONSTRUCTION = 10
    """Which blocks end with an earlier span of their text."""
    RECONSTRUCTED_SPAN = 11
    META_PERIOD = 12
    """Text tokens between the meta-tokens of an instance."""
    NEEDLE = 13
    """Which blocks hide something of a long-context task, what and where."""
    COUPLING = 14
    """Where the coupled positions of an instance start."""


def splitmix64(state: Uint64Array) -> Uint64Array:
    """Return the SplitMix64 output that follows each state; a new array of the same shape.

    `splitmix64(key + slot * gamma)` is output number `slot` of the generator seeded with `key`; the outputs before it
    are not computed. The function is a bijection of 64-bit words. `state` must have at least one dimension.
    """
    word = state + GOLDEN_GAMMA
    word ^= word >> _SHIFTS[0]
    word *= _FIRST_FACTOR
    word ^= word >> _SHIFTS[1]
    word *= _SECOND_FACTOR
    word ^= word >> _SHIFTS[2]
    return word


def hash_key(*words: int | npt.NDArray[np.int64]) -> Uint64Array:
    """Chain integers, or arrays of them that broadcast, into 64-bit keys of shape (B,) or (1,).

    Integers are taken modulo 2^64. The order of the words matters.
    """
    key: Uint64Array = np.zeros(1, dtype=np.uint64)
    for word in words:
        if isinstance(word, int):
            addend = np.array([word & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64)
        else:
            addend = np.atleast_1d(word).astype(np.uint64)
        key = splitmix64(key ^ addend)
    return key


class KeyedRandom:
    """A stream of draws that is a pure function of a 64-bit key: the outputs of SplitMix64, one after another.

    It makes the same choices in every release; numpy's and Python's generators do not promise that.
    """

    def __init__(self, key: int) -> None:
        self._state = _STEPS + np.uint64(key)
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound), uniform up to an error of bound / 2^64."""
        if not self._words:
            self._words = splitmix64(self._state)[::-1].tolist()
            self._state += _STRIDE
        return self._words.pop() * bound >> _WORD_BITS

    def between(self, lowest: int, highest: int) -> int:
        """Return an integer in [lowest, highest]."""
        return lowest + self.below(highest - lowest + 1)

    def choose(self, choices: Sequence[_Choice]) -> _Choice:
        """Return one of the choices."""
        return choices[self.below(len(choices))]

    def shuffle(self, choices: Sequence[_Choice]) -> Iterator[_Choice]:
        """Yield the choices in a random order, each once, drawn one by one."""
        rest = list(choices)
        while rest:
            chosen = self.below(len(rest))
            rest[chosen], rest[-1] = rest[-1], rest[chosen]
            yield rest.pop()
