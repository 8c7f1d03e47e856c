"""States exchanged between the two prompts of a pair: which of them the answer depends on.

Denoising, clean into corrupt, asks whether a state suffices for the answer; noising, corrupt into clean, whether it is
needed. Only meta-tokens behind the item matter: the others are the same in both prompts. `patch_map` goes position by
position in one pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import FloatArray, PairBatch, Ratio, Scores, batches_of, join_scores, stack_pairs
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.lens import edits

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.lens import Lens

State = Literal["meta", "ordinary", "item", "last"]
Direction = Literal["denoise", "noise"]

STATES: tuple[State, ...] = get_args(State)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
BATCH_SIZE = 16
_NAMES: dict[State, str] = {
    "meta": "meta-tokens",
    "ordinary": "ordinary tokens",
    "item": "the item",
    "last": "last token",
}


class Patch(NamedTuple):
    """Which states of the residual stream are taken from the other prompt."""

    state: State
    """meta: the meta-tokens behind the item. Controls: ordinary, as many text tokens as near to them as can be
    (`matched_positions`); item, its own tokens; last, the token whose output is scored."""
    direction: Direction
    window: int
    """Sites patched together, around `site`; those that do not exist are left out."""
    site: int
    """0 what enters the first block, l what leaves block l - 1."""


@dataclass(frozen=True)
class Interchange:
    """Scores of the answer of the clean prompt, in every run."""

    clean: Scores
    corrupt: Scores
    """Below 0 where the model is right: this prompt's answer is the foil."""
    patched: dict[Patch, Scores]

    def effect(self, patch: Patch) -> Ratio:
        """Return which part of the way to the source's logit difference the patch goes: 0 none, 1 all.

        For denoising that is the share of the answer restored, for noising the share of it destroyed.
        """
        of_clean, of_corrupt = self.clean.logit_difference, self.corrupt.logit_difference
        base, source = (of_corrupt, of_clean) if patch.direction == "denoise" else (of_clean, of_corrupt)
        return Ratio(self.patched[patch].logit_difference - base, source - base)


def interchange(
    lens: Lens,
    pairs: Sequence[MinimalPair],
    *,
    states: Sequence[State] = STATES,
    directions: Sequence[Direction] = DIRECTIONS,
    windows: Sequence[int] = (1, 3),
    batch_size: int = BATCH_SIZE,
) -> Interchange:
    """Patch states between the two prompts of each pair, at every site.

    Runs (sites) x (states) x (directions) x (windows) forward passes a batch, and holds the residual stream of two.

    Args:
        lens: around the model.
        pairs: minimal pairs in its tokens.
        states: which tokens' states.
        directions: denoise, clean into corrupt, or noise, the reverse.
        windows: numbers of neighbouring sites patched together, odd.
        batch_size: pairs of one forward pass.

    Raises:
        UsageError: see `batches_of`.
    """
    names = _site_names(lens)
    parts: list[dict[Patch | str, Scores]] = []
    for batch, rows in batches_of(lens, pairs, batch_size):
        with lens.capture(names) as of_clean:
            scores: dict[Patch | str, Scores] = {"clean": batch.score(lens, batch.clean)}
        with lens.capture(names) as of_corrupt:
            scores["corrupt"] = batch.score(lens, batch.corrupt)
        masks = _state_masks(batch, pairs[rows])
        for patch in _patches(states, directions, windows, len(names)):
            base, source = (batch.corrupt, of_clean) if patch.direction == "denoise" else (batch.clean, of_corrupt)
            reach = patch.window // 2
            nearby = names[max(0, patch.site - reach) : patch.site + reach + 1]
            with lens.edit(*(edits.replace(name, source[name], at=masks[patch.state]) for name in nearby)):
                scores[patch] = batch.score(lens, base)
        parts.append(scores)
    joined = join_scores(parts)
    patched = {key: value for key, value in joined.items() if isinstance(key, Patch)}
    return Interchange(joined["clean"], joined["corrupt"], patched)


def patch_map(lens: Lens, pair: MinimalPair, *, batch_size: int = BATCH_SIZE) -> FloatArray:
    """Patch the state of one position at one site from the clean run into the corrupt one, for each of them.

    It is denoising by a window of 1, of a single position. Each row of a batch is the corrupt prompt with another
    position patched: (sites) x (positions from the item on) / (batch size) forward passes.

    Args:
        lens: around the model.
        pair: a minimal pair in its tokens.
        batch_size: positions of one forward pass.

    Returns:
        (L + 1, T), the share of the logit difference restored: 0 none, 1 all; site 0 is what enters the first block, l
        what leaves block l - 1. 0 before the item, where both runs are the same; NaN where both prompts score alike.
    """
    names = _site_names(lens)
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
        at = batch.mask(list(positions[:, None]))
        for site, name in enumerate(names):
            with lens.edit(edits.replace(name, of_clean[name], at=at)):
                scores = batch.score(lens, batch.corrupt)
            restored[site, positions] = (scores.logit_difference - corrupt) / (clean - corrupt)
    return restored


def matched_positions(pair: MinimalPair) -> IntArray:
    """Return as many ordinary positions as there are meta-tokens behind the item, each as near to one as can be.

    They are text tokens behind the item, and not the last token. Of two equally near, the earlier is taken: its prefix
    is the meta-token's own. A row with fewer text tokens than meta-tokens there has fewer.
    """
    columns = np.arange(pair.item_positions[-1] + 1, len(pair.clean) - 1)
    free = np.setdiff1d(columns, pair.meta_positions)
    taken = []
    for meta in pair.later_meta_positions[: len(free)]:
        nearest = int(free[np.abs(free - meta).argmin()])
        taken.append(nearest)
        free = free[free != nearest]
    return np.array(sorted(taken), dtype=np.int64)


def _site_names(lens: Lens) -> list[str]:
    """Return the taps of the L + 1 sites of a patch."""
    return ["embed.hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(len(lens.layout.blocks)))]


def _state_masks(batch: PairBatch, pairs: Sequence[MinimalPair]) -> dict[State, Tensor]:
    return {
        "meta": batch.is_later_meta,
        "ordinary": batch.mask([matched_positions(pair) for pair in pairs]),
        "item": batch.is_item,
        "last": batch.mask([np.array([len(pair.clean) - 1]) for pair in pairs]),
    }


def _patches(
    states: Sequence[State], directions: Sequence[Direction], windows: Sequence[int], num_sites: int
) -> Iterator[Patch]:
    for window in windows:
        if window < 1 or window % 2 == 0:
            raise UsageError("window of sites", expected="an odd number", found=str(window), remedy="give 1 or 3")
    for state in states:
        for direction in directions:
            for window in windows:
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
    """Share of the way to the other prompt's logit difference that its states lead, a ratio of means over pairs.

    At one site or three neighbouring ones; clean into corrupt (denoise) and the reverse (noise).
    """
    exchanged = interchange(inputs.lens, pairs_of(inputs))
    for patch in exchanged.patched:
        effect = exchanged.effect(patch)
        at: dict[str, str | int] = {
            "layer": patch.site,
            "where": _NAMES[patch.state],
            "direction": patch.direction,
            "window": patch.window,
        }
        yield Row(at, np.stack([effect.numerators, effect.denominators], axis=1))
