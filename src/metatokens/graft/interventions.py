"""What can be taken from the anchors of a grafted model for a while, to see what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metatokens.graft.grafting import graft_of, switched_off

_NEVER = 2**31 - 1
"""As many tokens from one anchor to the next as no text has."""


def zeroed_row(model: Any) -> AbstractContextManager[None]:
    """Zero the learned row: an anchor's embedding is that of the token before it."""
    return _zeroed([graft_of(model).row])


def untrained(model: Any) -> AbstractContextManager[None]:
    """Zero all that the graft has learned: it is the plain model that keeps every n-th token."""
    return _zeroed(graft_of(model).parameters())


@contextmanager
def without_anchors(model: Any) -> Iterator[None]:
    """Cut the path through the anchors: text sees the first tokens and its window, and nothing else of the past.

    With positions "compact" the first tokens stand right in front of the window, where the anchors were.
    """
    added = graft_of(model)
    config, added.config = added.config, replace(added.config, every=_NEVER)
    try:
        yield
    finally:
        added.config = config


INTERVENTIONS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "row zeroed": zeroed_row,
    "untrained": untrained,
    "path cut": without_anchors,
    "switched off": switched_off,
}
"""By name. Switched off it is the plain model, which sees all of the text."""


@contextmanager
def _zeroed(parameters: Iterable[Tensor]) -> Iterator[None]:
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
