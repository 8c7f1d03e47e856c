"""What a policy is: a function from columns, queries and a budget to who sees whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metatokens.errors import UsageError

DEFAULT_SINKS = 4  # Xiao et al. 2024, section 3.2: four suffice


@dataclass(frozen=True)
class Budget:
    """How many columns the cache may hold when a text of known length has been read."""

    columns: int
    """All columns of a layer."""
    length: int
    """Tokens of the text, for policies that spread their columns over it."""
    sinks: int = DEFAULT_SINKS
    """The first tokens, which every policy but `window` keeps."""
    window: int | None = None
    """The newest tokens that a policy with other columns to keep holds; None means half of the columns."""

    def __post_init__(self) -> None:
        """Refuse a budget without a column; what more is needed, its policy says."""
        if self.sinks < 0 or self.columns < 1:
            raise UsageError(
                f"cache of {self.columns} columns and {self.sinks} sinks",
                expected="at least 1 column, and sinks that are not negative",
                found=f"{self.columns} and {self.sinks}",
                remedy="raise them",
            )

    def require_window(self) -> None:
        """Refuse a budget of sinks alone, for a policy that keeps them and the newest columns."""
        if self.columns <= self.sinks:
            raise self._too_small(f"more than {self.sinks} sinks", f"{self.columns} columns")

    def require_anchors(self) -> None:
        """Refuse a budget that leaves nothing between sinks and window, for a policy that keeps columns there."""
        if self.newest < 1 or self.anchors < 1:
            raise self._too_small(
                f"more than {self.sinks} sinks and a window of {self.newest}, which is at least 1",
                f"{self.anchors} columns left between them",
            )

    def require_spans(self) -> None:
        """Refuse a budget whose window is shorter than a span of its spacing, for a policy that pools whole spans."""
        self.require_anchors()
        if self.spacing > self.newest:
            raise self._too_small(
                f"a window that holds the {self.spacing} tokens of which one column is made",
                f"a window of {self.newest}",
            )

    def _too_small(self, expected: str, found: str) -> UsageError:
        remedy = "raise the number of columns, or lower sinks or window"
        return UsageError(f"cache of {self.columns} columns", expected=expected, found=found, remedy=remedy)

    @property
    def newest(self) -> int:
        """The window of a policy that keeps other columns too."""
        return self.columns // 2 if self.window is None else self.window

    @property
    def anchors(self) -> int:
        """Columns between sinks and window."""
        return self.columns - self.sinks - self.newest

    @property
    def spacing(self) -> int:
        """Tokens for each column between sinks and window, so that the whole text has one every so often."""
        return max(1, math.ceil((self.length - self.sinks - self.newest) / self.anchors))


@dataclass
class Columns:
    """The columns that a forward pass attends to, each (B, C); a row may lack some."""

    positions: Tensor
    """int64, the token's place in its text, of a pool its last token's; -1 where a row has no such column."""
    is_separator: Tensor
    """bool."""
    is_pool: Tensor
    """bool, the mean of several tokens."""

    def joined(self, other: Columns) -> Columns:
        """Return these columns and then the other's."""
        return Columns(
            torch.cat([self.positions, other.positions], 1),
            torch.cat([self.is_separator, other.is_separator], 1),
            torch.cat([self.is_pool, other.is_pool], 1),
        )


Sees = Callable[[Columns, Tensor, Budget], Tensor]
"""Takes columns (B, C), the positions of queries (B, Q) and a budget, and returns (B, Q, C) bool. What a query sees of
the past must be seen by every earlier query behind it, since what has been dropped does not come back. Causality and
columns that a row lacks are not its business."""


@dataclass(frozen=True)
class Policy:
    """A registered policy."""

    name: str
    sees: Sees
    check: Callable[[Budget], None]
    """Refuses a budget that is too small for it."""
    tokens_in_pool: Callable[[Budget], int] | None = None
    """How many tokens share a pool; None means that there are no pools."""

    @property
    def evicts(self) -> bool:
        """Whether anything is dropped; the policy `full` leaves the model its own cache."""
        return self.name != "full"


POLICIES: dict[str, Policy] = {}
"""By name, in the order of the files."""


def policy(
    name: str,
    *,
    check: Callable[[Budget], None] = lambda _: None,
    tokens_in_pool: Callable[[Budget], int] | None = None,
) -> Callable[[Sees], Sees]:
    """Register the decorated function as a policy."""

    def register(sees: Sees) -> Sees:
        POLICIES[name] = Policy(name, sees, check, tokens_in_pool)
        return sees

    return register


def find_policy(name: str) -> Policy:
    """Return a policy by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in POLICIES:
        raise UsageError(
            "policy", expected=f"one of {', '.join(POLICIES)}", found=repr(name), remedy="name one of them"
        )
    return POLICIES[name]


def in_window(columns: Columns, queries: Tensor, window: int) -> Tensor:
    """Return (B, Q, C): the newest `window` tokens, the query among them."""
    return columns.positions[:, None] > queries[..., None] - window


def is_sink(columns: Columns, budget: Budget) -> Tensor:
    """Return (B, 1, C): the first tokens of the text."""
    return (columns.positions < budget.sinks)[:, None] & ~columns.is_pool[:, None]


def newest(candidates: Tensor, limit: int) -> Tensor:
    """Return the last `limit` of each query's candidates, (B, Q, C); columns stand in the order of the text."""
    from_the_end: Tensor = candidates.flip(-1).cumsum(-1).flip(-1)
    return candidates & (from_the_end <= limit)
