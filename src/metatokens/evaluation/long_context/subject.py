"""The model under test, with what the suite must know of it: its tokens, its meta-tokens, its longest text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.data.tokenizer import as_text_tokenizer, ends_clause_table, prefix_ids, text_vocab_size
from metatokens.errors import NumericError, UsageError
from metatokens.evaluation.long_context.items import Item
from metatokens.generation.decoding import sequence_limit
from metatokens.model.schedule import NoSchedule, read_schedule, schedule_meta_tokens

if TYPE_CHECKING:
    from metatokens.data.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class Row:
    """A text in the ids of the model."""

    ids: list[int]
    """Text and meta-tokens."""
    targets: list[int]
    """Columns of the tokens that are scored, each by the logits of the column before it."""


class SubjectTokens:
    """The tokenizer of a model under test: text to ids, as the model is used to them."""

    def __init__(self, tokenizer: AnyTokenizer, *, prefix: tuple[int, ...] | None = None) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: of the model.
            prefix: ids before every text; None means those that a tokenizer of transformers puts there, or else none.
        """
        # not the bulk encoder, which refuses a text with a byte that the vocabulary lacks
        self._tokenizer = as_text_tokenizer(tokenizer)
        self._prefix = list(prefix_ids(tokenizer) if prefix is None else prefix)

    @cached_property
    def vocab_size(self) -> int:
        """Number of text tokens; a later id is never an answer."""
        return text_vocab_size(self._tokenizer)

    @cached_property
    def ends_clause(self) -> npt.NDArray[np.bool_]:
        """(V,), which tokens end a clause."""
        return ends_clause_table(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text behind the prefix, without meta-tokens."""
        return [*self._prefix, *self._tokenizer.encode(text, add_special_tokens=False).ids]


class Subject:
    """A causal language model of transformers, or of this package, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: AnyTokenizer, *, prefix: tuple[int, ...] | None = None) -> None:
        """Put model and tokenizer together.

        Args:
            model: in evaluation mode. One of this package reads its meta-tokens where its checkpoint says.
            tokenizer: of the model.
            prefix: as for `SubjectTokens`.
        """
        # what `metatokens.load` has wrapped is read as it came
        self.model = getattr(model, "wrapped", model)
        self.tokens = SubjectTokens(tokenizer, prefix=prefix)
        self.encode = self.tokens.encode
        self.vocab_size = self.tokens.vocab_size
        self._schedule = read_schedule(getattr(model.generation_config, "meta_schedule", None)) or NoSchedule()

    @cached_property
    def separators(self) -> Tensor:
        """(rows of the embedding,) bool, on the model's device: which tokens end a clause."""
        table = self.tokens.ends_clause
        rows = max(self.model.get_input_embeddings().weight.shape[0], len(table))
        return torch.from_numpy(np.pad(table, (0, rows - len(table)))).to(self.model.device)

    def row_of(self, item: Item) -> Row:
        """Return the row of an item, whose targets are its answer."""
        return self._with_meta_tokens(self.encode(item.prompt + item.answer), len(self.encode(item.prompt)))

    def row_of_text(self, ids: list[int]) -> Row:
        """Return the row of ids without meta-tokens; every token but the first is a target."""
        return self._with_meta_tokens(ids, 1)

    def check_length(self, length: int, what: str) -> None:
        """Refuse a text of `length` text tokens if, with its meta-tokens, it is longer than the model.

        Raises:
            UsageError: it has.
        """
        limit = sequence_limit(self.model)
        positions = len(self._with_meta_tokens([0] * length, 1).ids)
        if limit is not None and positions > limit:
            raise UsageError(
                f"{what} {length}",
                expected=f"at most the {limit} positions of the model",
                found=f"{positions} with meta-tokens" if positions > length else str(length),
                remedy=f"lower {what}, or extend the model",
            )

    def _with_meta_tokens(self, ids: list[int], first_target: int) -> Row:
        meta_token_id = getattr(self.model.config, "meta_token_id", None)
        if meta_token_id is None or self._schedule.is_empty:
            return Row(ids, list(range(first_target, len(ids))))
        laid_out = schedule_meta_tokens(ids, self._schedule, meta_token_id=meta_token_id)
        columns = [column for column, token in enumerate(laid_out) if token != meta_token_id]
        return Row(laid_out, columns[first_target:])


def require_finite(logits: Tensor, what: str) -> None:
    """Refuse logits of `what` that cannot be scored.

    Raises:
        NumericError: one is not finite.
    """
    if not logits.isfinite().all():
        raise NumericError(
            f"logits of {what}",
            expected="finite ones",
            found="infinities or NaN",
            remedy="check the weights, or load the model in float32",
        )
