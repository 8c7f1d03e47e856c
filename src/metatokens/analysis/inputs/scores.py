"""Minimal pairs in batches, and how well a model tells the answer of a pair from its foil.

The metric is the logit difference, answer minus foil, which is about linear in what a patch or a cut does (Zhang and
Nanda 2023); cross-entropy and accuracy come with it. Every score is one number a pair, so intervals are over pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.errors import UsageError

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.lens import Lens

FloatArray = npt.NDArray[np.float64]
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Scores:
    """Scores of pairs under one condition; arrays of shape (pairs,)."""

    logit_difference: FloatArray
    """Logit of the answer minus that of the foil."""
    cross_entropy: FloatArray
    """Nats of the answer, over the whole vocabulary."""
    accuracy: FloatArray
    """1 where the answer is the most likely text token, else 0; a half where a mean of two prompts is."""

    @classmethod
    def of_logits(cls, logits: Tensor, answer: Tensor, foil: Tensor, meta_token_id: int | None = None) -> Self:
        """Score logits (B, V) against answers and foils, (B,) each; ids from the meta-token's on are no text."""
        logits = logits.double()
        of_answer, of_foil = (logits.gather(1, token[:, None])[:, 0] for token in (answer, foil))
        scores = (of_answer - of_foil, logits.logsumexp(-1) - of_answer, logits[:, :meta_token_id].argmax(-1) == answer)
        return cls(*(score.cpu().numpy().astype(np.float64) for score in scores))

    def mean_with(self, other: Scores) -> Scores:
        """Return the mean of two scores of each pair, of its two prompts for instance."""
        return Scores(*((own + its) / 2 for own, its in zip(self._arrays, other._arrays, strict=True)))

    @property
    def _arrays(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return self.logit_difference, self.cross_entropy, self.accuracy


@dataclass(frozen=True)
class Ratio:
    """A ratio of means over pairs, as the numbers that an interval needs."""

    numerators: FloatArray
    """(pairs,)."""
    denominators: FloatArray
    """(pairs,); of either sign."""

    @property
    def estimate(self) -> float:
        """The ratio of the means, not the mean of the ratios."""
        return float(self.numerators.sum() / self.denominators.sum())


@dataclass(frozen=True)
class PairBatch:
    """Pairs as rows of one batch, padded on the right, where causality keeps padding out of sight."""

    clean: Tensor
    """(B, T) int64."""
    corrupt: Tensor
    """(B, T)."""
    answer: Tensor
    """(B,), the token that follows `clean`; the foil follows `corrupt`."""
    foil: Tensor
    """(B,)."""
    last: Tensor
    """(B,), the column whose output is scored."""
    is_item: Tensor
    """(B, T) bool."""
    is_meta: Tensor
    """(B, T) bool: all meta-tokens."""
    is_later_meta: Tensor
    """(B, T) bool: those behind the item."""
    is_question: Tensor
    """(B, T) bool: text tokens behind the body."""
    is_between: Tensor
    """(B, T) bool: text tokens between the item and the question."""

    def mask(self, columns: Sequence[IntArray]) -> Tensor:
        """Return (B, T) bool, True at the columns of each row."""
        mask = torch.zeros_like(self.is_item)
        for row, chosen in enumerate(columns):
            mask[row, torch.from_numpy(chosen).to(mask.device)] = True
        return mask

    def score(self, lens: Lens, ids: Tensor, *, towards_foil: bool = False) -> Scores:
        """Run prompts (B, T) under the edits of the lens and score the answer, or the foil in its place."""
        positions, place = self.last.unique(return_inverse=True)
        logits = lens(ids, use_cache=False, logits_to_keep=positions).logits
        logits = logits[torch.arange(len(place), device=place.device), place]
        right, wrong = (self.foil, self.answer) if towards_foil else (self.answer, self.foil)
        return Scores.of_logits(logits, right, wrong, getattr(lens.model.config, "meta_token_id", None))

    def score_both(self, lens: Lens) -> Scores:
        """Return the mean over the two prompts of a pair, each scored towards its own answer; at chance exactly 0."""
        of_clean = self.score(lens, self.clean)
        return of_clean.mean_with(self.score(lens, self.corrupt, towards_foil=True))


def stack_pairs(pairs: Sequence[MinimalPair], device: Any = "cpu") -> PairBatch:
    """Put pairs into one batch."""
    num_columns = max(len(pair.clean) for pair in pairs)
    ids = torch.zeros((2, len(pairs), num_columns), dtype=torch.int64)
    masks = torch.zeros((5, len(pairs), num_columns), dtype=torch.bool)
    for row, pair in enumerate(pairs):
        length = len(pair.clean)
        ids[:, row] = pair.answer  # padding: any text token
        ids[:, row, :length] = torch.from_numpy(np.stack([pair.clean, pair.corrupt]))
        columns = np.arange(length)
        is_meta = np.isin(columns, pair.meta_positions)
        is_behind = columns > pair.item_positions[-1]
        is_question = columns >= pair.question_start
        masks[:, row, :length] = torch.from_numpy(
            np.stack(
                [
                    np.isin(columns, pair.item_positions),
                    is_meta,
                    is_meta & is_behind,
                    ~is_meta & is_question,
                    ~is_meta & is_behind & ~is_question,
                ]
            )
        )
    answer, foil, last = (
        torch.tensor(values, device=device)
        for values in zip(*((pair.answer, pair.foil, len(pair.clean) - 1) for pair in pairs), strict=True)
    )
    clean, corrupt = ids.to(device)
    is_item, is_meta, is_later_meta, is_question, is_between = masks.to(device)
    return PairBatch(
        clean=clean,
        corrupt=corrupt,
        answer=answer,
        foil=foil,
        last=last,
        is_item=is_item,
        is_meta=is_meta,
        is_later_meta=is_later_meta,
        is_question=is_question,
        is_between=is_between,
    )


def batches_of(lens: Lens, pairs: Sequence[MinimalPair], batch_size: int) -> Iterator[tuple[PairBatch, slice]]:
    """Yield the pairs in batches on the device of the model, each with its place among them.

    Raises:
        UsageError: No pair, or none with a meta-token behind its item.
    """
    if not any(len(pair.later_meta_positions) for pair in pairs):
        raise UsageError(
            "minimal pairs",
            expected="some with a meta-token behind the item",
            found=f"none of {len(pairs)}",
            remedy="make pairs of a task whose meta_places put meta-tokens there",
        )
    for start in range(0, len(pairs), batch_size):
        rows = slice(start, start + batch_size)
        yield stack_pairs(pairs[rows], lens.model.device), rows


def join_scores(parts: Sequence[Mapping[_Key, Scores]]) -> dict[_Key, Scores]:
    """Put the scores of batches behind each other, for each condition."""
    return {
        key: Scores(*(np.concatenate(arrays) for arrays in zip(*(part[key]._arrays for part in parts), strict=True)))
        for key in parts[0]
    }


def meta_layers(lens: Lens) -> list[int]:
    """Return the layers that have meta-attention."""
    return [site.layer for block in lens.layout.blocks for site in block.attentions if site.branch == "meta_attn"]
