"""Minimal pairs in batches, and how well a model tells the answer of a pair from its foil.

The metric is the logit difference, answer minus foil, which is about linear in what a patch or a cut does (Zhang and
Nanda 2023); cross-entropy and accuracy come with it. Every score is one number a pair, so intervals are over pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.lens import Lens

FloatArray = npt.NDArray[np.float64]
BATCH_SIZE = 16
_Key = TypeVar("_Key")


class Scores(NamedTuple):
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


@dataclass(frozen=True)
class PairBatch:
    """Pairs as rows of one batch, padded on the right, where causality keeps padding out of sight."""

    pairs: Sequence[MinimalPair]
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

    def mask(self, columns: Iterable[IntArray | Tensor]) -> Tensor:
        """Return (B, T) bool, True at the columns of each row."""
        mask = torch.zeros_like(self.is_item)
        for row, chosen in enumerate(columns):
            mask[row, torch.as_tensor(chosen, device=mask.device)] = True
        return mask

    def score(self, lens: Lens, ids: Tensor, *, towards_foil: bool = False) -> Scores:
        """Run prompts (B, T) under the edits of the lens and score the answer, or the foil in its place."""
        logits = logits_at(lens, ids, self.last)
        right, wrong = (self.foil, self.answer) if towards_foil else (self.answer, self.foil)
        return Scores.of_logits(logits, right, wrong, lens.meta_token_id)

    def score_both(self, lens: Lens) -> Scores:
        """Return the mean over the two prompts of a pair, each scored towards its own answer; at chance exactly 0."""
        both = self.score(lens, self.clean), self.score(lens, self.corrupt, towards_foil=True)
        return Scores(*((of_clean + of_corrupt) / 2 for of_clean, of_corrupt in zip(*both, strict=True)))


def logits_at(lens: Lens, ids: Tensor, columns: Tensor) -> Tensor:
    """Run rows (B, T) under the edits of the lens and return the logits (B, V) at one column of each, (B,)."""
    positions, place = columns.unique(return_inverse=True)
    logits = lens.run(ids, logits_to_keep=positions).logits
    found: Tensor = logits[torch.arange(len(place), device=place.device), place]
    return found


def stack_pairs(pairs: Sequence[MinimalPair], device: Any = "cpu") -> PairBatch:
    """Put pairs into one batch."""
    shape = len(pairs), max(len(pair.clean) for pair in pairs)
    ids = torch.zeros((2, *shape), dtype=torch.int64)
    masks = torch.zeros((5, *shape), dtype=torch.bool)
    for row, pair in enumerate(pairs):
        columns = np.arange(len(pair.clean))
        is_item = np.isin(columns, pair.item_positions)
        is_meta = np.isin(columns, pair.meta_positions)
        is_behind = columns > pair.item_positions[-1]
        is_question = ~is_meta & (columns >= pair.question_start)
        is_between = ~is_meta & is_behind & ~is_question
        ids[:, row] = pair.answer  # padding: any text token
        ids[:, row, columns] = torch.from_numpy(np.stack([pair.clean, pair.corrupt]))
        masks[:, row, columns] = torch.from_numpy(
            np.stack([is_item, is_meta, is_meta & is_behind, is_question, is_between])
        )
    ends = torch.tensor([(pair.answer, pair.foil, len(pair.clean) - 1) for pair in pairs], device=device)
    return PairBatch(pairs, *ids.to(device), *ends.T, *masks.to(device))


def batches_of(lens: Lens, pairs: Sequence[MinimalPair], batch_size: int = BATCH_SIZE) -> Iterator[PairBatch]:
    """Yield the pairs in batches on the device of the model.

    Raises:
        ValueError: No pair has a meta-token behind its item.
    """
    if not any(len(pair.later_meta_positions) for pair in pairs):
        raise ValueError(f"none of {len(pairs)} minimal pairs has a meta-token behind its item")
    for start in range(0, len(pairs), batch_size):
        yield stack_pairs(pairs[start : start + batch_size], lens.model.device)


def join_scores(parts: Iterable[Mapping[_Key, Scores]]) -> dict[_Key, Scores]:
    """Put the scores of batches behind each other, for each condition."""
    first, *others = parts
    return {
        key: Scores(*map(np.concatenate, zip(scores, *(part[key] for part in others), strict=True)))
        for key, scores in first.items()
    }
