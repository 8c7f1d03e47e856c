"""States exchanged between the two prompts of a pair: which of them the answer depends on.

Denoising, clean into corrupt, asks whether a state suffices for the answer; noising, corrupt into clean, whether it is
needed. Only meta-tokens behind the item matter: the others are the same in both prompts. `patch_map` patches one pair,
position by position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import (
    BATCH_SIZE,
    FloatArray,
    PairBatch,
    Scores,
    batches_of,
    join_scores,
    stack_pairs,
)
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.lens import edits
from metatokens.lens.residuals import residual_names

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.lens import Lens

State = Literal["meta", "ordinary", "item", "last"]
Direction = Literal["denoise", "noise"]

STATES: tuple[State, ...] = get_args(State)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
WINDOWS = (1, 3)
_NAMES: dict[State, str] = {
    "meta": "meta-tokens",
    "ordinary": "ordinary tokens",
    "item": "the item",
    "last": "last token",
}


class Patch(NamedTuple):
    """Which states of the residual stream are taken from the other prompt."""

    state: State
    """meta: the meta-tokens behind the item. Controls: ordinary, an equal number of text tokens next to them
    (`matched_positions`); item, its own tokens; last, the token whose output is scored."""
    direction: Direction
    window: int
    """Sites patched together, around `site`; those that do not exist are left out."""
    site: int
    """0 what enters the first block, l what leaves block l - 1."""


def interchange(lens: Lens, pairs: Sequence[MinimalPair], *, batch_size: int = BATCH_SIZE) -> dict[Patch, FloatArray]:
    """Patch states between the two prompts of each pair, at every site.

    Runs (sites) x (states) x (directions) x (windows) forward passes a batch, and holds the residual stream of two.

    Args:
        lens: On the model.
        pairs: Minimal pairs in its tokens.
        batch_size: Pairs of one forward pass.

    Returns:
        (pairs, 2) for each patch: by how much it moves the logit difference of the clean prompt's answer, and how far
        that of the source is. Their ratio is 0 for a patch without effect and 1 for one that goes all the way: the
        share of the answer that denoising restores, or that noising destroys.

    Raises:
        ValueError: See `batches_of`.
    """
    names = residual_names(lens)

    def score(batch: PairBatch) -> Iterator[tuple[Patch | str, Scores]]:
        with lens.capture(names) as of_clean:
            yield "clean", batch.score(lens, batch.clean)
        with lens.capture(names) as of_corrupt:
            yield "corrupt", batch.score(lens, batch.corrupt)
        masks = _state_masks(batch)
        for patch in _patches(len(names)):
            base, source = (batch.corrupt, of_clean) if patch.direction == "denoise" else (batch.clean, of_corrupt)
            reach = patch.window // 2
            nearby = names[max(0, patch.site - reach) : patch.site + reach + 1]
            with lens.edit(*(edits.replace(name, source[name], at=masks[patch.state]) for name in nearby)):
                yield patch, batch.score(lens, base)

    scores = join_scores(dict(score(batch)) for batch in batches_of(lens, pairs, batch_size))
    clean, corrupt = (scores.pop(prompt).logit_difference for prompt in ("clean", "corrupt"))
    effects = {}
    for patch, patched in scores.items():
        assert isinstance(patch, Patch)
        base, source = (corrupt, clean) if patch.direction == "denoise" else (clean, corrupt)
        effects[patch] = np.stack([patched.logit_difference - base, source - base], axis=1)
    return effects


def patch_map(lens: Lens, pair: MinimalPair, *, batch_size: int = BATCH_SIZE) -> FloatArray:
    """Patch the state of one position at one site from the clean run into the corrupt one, for each of them.

    This is denoising with a window of 1, of a single position. Each row of a batch is the corrupt prompt with another
    position patched: (sites) x (positions from the item on) / (batch size) forward passes.

    Args:
        lens: On the model.
        pair: A minimal pair in its tokens.
        batch_size: Positions of one forward pass.

    Returns:
        (L + 1, T), the share of the logit difference restored: 0 none, 1 all; site 0 is what enters the first block, l
        what leaves block l - 1. 0 before the item, where both runs are the same; NaN where both prompts score alike.
    """
    names = residual_names(lens)
    device, num_tokens = lens.model.device, len(pair.clean)
    both = stack_pairs([pair], device)
    with lens.capture(names) as of_clean:
        clean = float(both.score(lens, both.clean).logit_difference[0])
    corrupt = float(both.score(lens, both.corrupt).logit_difference[0])
    restored = np.zeros((len(names), num_tokens))
    if clean == corrupt:
        return np.full_like(restored, np.nan)
    for start in range(int(pair.item_positions[0]), num_tokens, batch_size):
        positions = np.arange(start, min(start + batch_size, num_tokens))
        batch = stack_pairs([pair] * len(positions), device)
        at = batch.mask(positions[:, None])
        for site, name in enumerate(names):
            with lens.edit(edits.replace(name, of_clean[name], at=at)):
                scores = batch.score(lens, batch.corrupt)
            restored[site, positions] = (scores.logit_difference - corrupt) / (clean - corrupt)
    return restored


def matched_positions(pair: MinimalPair) -> IntArray:
    """Return for each meta-token behind the item the nearest free text position behind the item, rising.

    The last token is never taken. Of two equally near ones the earlier is: its prefix is the meta-token's own. A row
    with fewer text tokens than meta-tokens there has fewer positions.
    """
    columns = np.arange(pair.item_positions[-1] + 1, len(pair.clean) - 1)
    free = np.setdiff1d(columns, pair.meta_positions)
    taken = []
    for meta in pair.later_meta_positions[: len(free)]:
        nearest = int(free[np.abs(free - meta).argmin()])
        taken.append(nearest)
        free = free[free != nearest]
    return np.array(sorted(taken), dtype=np.int64)


def _state_masks(batch: PairBatch) -> dict[State, Tensor]:
    return {
        "meta": batch.is_later_meta,
        "ordinary": batch.mask(matched_positions(pair) for pair in batch.pairs),
        "item": batch.is_item,
        "last": batch.mask(batch.last),
    }


def _patches(num_sites: int) -> Iterator[Patch]:
    for state, direction, window in itertools.product(STATES, DIRECTIONS, WINDOWS):
        for site in range(num_sites):
            yield Patch(state, direction, window, site)


@measure(
    "causal",
    "1",
    axes=("layer", "where", "direction", "window"),
    statistic="ratio",
    subject="task",
    plot=Lines("layer", by="where", panels="direction"),
)
def interchange_effect(inputs: Inputs) -> Rows:
    """Share of the distance between the two prompts' logit differences that a patch goes, a ratio of means over pairs.

    At one site or three neighbouring ones; clean into corrupt (denoise) and the reverse (noise).
    """
    for patch, effect in interchange(inputs.lens, pairs_of(inputs)).items():
        at: dict[str, str | int] = {
            "layer": patch.site,
            "where": _NAMES[patch.state],
            "direction": patch.direction,
            "window": patch.window,
        }
        yield Row(at, effect)
