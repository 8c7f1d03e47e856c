"""Which columns of a key-value cache stay: the policies of an eviction.

A budget is a number of columns. Under every policy it goes first to the first few columns (attention sinks, Xiao et
al. 2024) and to the newest few, then to the columns that the policy prefers, then to the newest of the rest:

    window         nothing: sinks and the newest (StreamingLLM)
    meta           meta-tokens, newest first
    slots          the ordinary token before each meta-token, newest first: what a place is worth without a meta-token
    even           evenly spaced
    random         drawn from (seed, document)
    heavy_hitters  for each layer and head those with the most attention so far (Zhang et al. 2023, H2O)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from metatokens.data.injection import BoolArray, IntArray
from metatokens.data.keyed_random import KeyedRandom

FloatArray = npt.NDArray[np.float64]
Policy = Literal["window", "meta", "slots", "even", "random", "heavy_hitters"]

POLICIES: tuple[Policy, ...] = get_args(Policy)


class AlwaysKept(NamedTuple):
    """Columns that stay under every policy."""

    sinks: int = 4
    """The first; four suffice (Xiao et al. 2024, section 3.2)."""
    newest: int = 16
    """The last."""


ALWAYS_KEPT = AlwaysKept()


@dataclass(frozen=True)
class Prefix:
    """What a policy may know of one document's prefix of n columns."""

    is_meta: BoolArray
    """(n,)."""
    received: FloatArray
    """(layers, heads, n), the attention that each column has received."""
    key: int = 0
    """Of the draws."""

    @property
    def is_slot(self) -> BoolArray:
        """(n,), the ordinary token before each meta-token."""
        slots: BoolArray = np.append(self.is_meta[1:], False) & ~self.is_meta
        return slots

    def __len__(self) -> int:
        """Return n."""
        return len(self.is_meta)


def choose_columns(policy: Policy, prefix: Prefix, num_kept: int, always_kept: AlwaysKept = ALWAYS_KEPT) -> IntArray:
    """Return the columns that stay, rising: (num_kept,), or (layers, heads, num_kept) for heavy_hitters."""
    columns = np.arange(len(prefix))
    num_first = min(always_kept.sinks, num_kept)
    num_newest = min(always_kept.newest, num_kept - num_first, len(prefix) - num_first)
    free = columns[num_first : len(prefix) - num_newest]
    count = num_kept - num_first - num_newest
    chosen = _PREFERENCES[policy](prefix, free, count) if count else free[:0]
    if chosen.shape[-1] < count:
        rest = np.setdiff1d(free, chosen)
        chosen = np.concatenate([chosen, rest[len(rest) - (count - len(chosen)) :]])
    always = np.concatenate([columns[:num_first], columns[len(prefix) - num_newest :]])
    always = np.broadcast_to(always, (*chosen.shape[:-1], len(always)))
    kept: IntArray = np.sort(np.concatenate([always, chosen], axis=-1), axis=-1)
    return kept


def _newest(mask_name: str) -> Callable[[Prefix, IntArray, int], IntArray]:
    def choose(prefix: Prefix, free: IntArray, count: int) -> IntArray:
        wanted: IntArray = free[getattr(prefix, mask_name)[free]]
        return wanted[max(0, len(wanted) - count) :]

    return choose


def _nothing(prefix: Prefix, free: IntArray, count: int) -> IntArray:
    del prefix, count
    return free[:0]


def _evenly_spaced(prefix: Prefix, free: IntArray, count: int) -> IntArray:
    del prefix
    # the middles of `count` equal parts; count <= len(free), so no two are the same
    return free[((np.arange(count) + 0.5) * len(free) / count).astype(np.int64)]


def _drawn(prefix: Prefix, free: IntArray, count: int) -> IntArray:
    order = KeyedRandom(prefix.key).shuffle(free.tolist())
    return np.array([next(order) for _ in range(count)], dtype=np.int64)


def _most_attended(prefix: Prefix, free: IntArray, count: int) -> IntArray:
    # of equal ones the newest: argsort of the reversed order is stable
    order = np.argsort(-prefix.received[..., free[::-1]], axis=-1, kind="stable")[..., :count]
    return free[::-1][order]


_PREFERENCES: dict[Policy, Callable[[Prefix, IntArray, int], IntArray]] = {
    "window": _nothing,
    "meta": _newest("is_meta"),
    "slots": _newest("is_slot"),
    "even": _evenly_spaced,
    "random": _drawn,
    "heavy_hitters": _most_attended,
}
