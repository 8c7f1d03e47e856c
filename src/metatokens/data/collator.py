"""A collator for the Hugging Face Trainer: it turns rows of text tokens into padded batches with meta-tokens.

The project's own training loop does not need it: its `loader` cuts equal blocks. Labels follow the Hugging Face
convention (not shifted) and amount to the loss policy skip. The collator masks them, not the model, because the
Trainer counts the labels of an accumulated step before it calls the model. A token keeps its label and masks when
meta-tokens (_) move it:

    input_ids            10  11  12  13              10   _  11  12  13
    labels             -100 -100  12  13    become  -100 -100 -100  12  13
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from metatokens.data.injection import (
    IGNORE_INDEX,
    BoolArray,
    IntArray,
    sample_prompt_positions,
    warn_without_meta_tokens,
)
from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer, ends_clause_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from metatokens.config.schema import Injection

MASKS_OF_LABELS = ("completion_mask", "assistant_masks")
"""TRL's columns: 1 where a token is learned, 0 where it is only read."""
CARRIED = ("input_ids", "attention_mask", "labels", *MASKS_OF_LABELS)


class MetaTokenCollator:
    """Callable that turns rows `{"input_ids": [...]}` of text tokens, of any lengths, into a batch.

        MetaTokenCollator(UniformInjection(0.1), tokenizer)

    With a tokenizer a row may be a string, too. A row of tokens may also have `attention_mask`, `labels` (-100 where
    there is no loss) and TRL's label masks, each with one value per token. A token that the attention mask hides counts
    as padding, not as text, and keeps its place. The Trainer drops columns that the model's `forward` does not take:
    label masks need `remove_unused_columns=False`.

    A row's layout depends only on the seed and the row's tokens, not on the batch or the worker. The same row gets the
    same layout every time.

    Args:
        injection: Policy of the meta-tokens; its ratio counts a row with its meta-tokens (see
            `sample_prompt_positions`).
        tokenizer: The model's tokenizer of transformers, which knows both ids; without it both must be given.
        meta_token_id: The id to put in; must not be a text token.
        pad_token_id: The id that fills short rows on the right; must not be the meta-token.
        seed: Key of the layouts.
        ends_clause: (V,) bool, needed by the policy punctuation where there is no tokenizer.

    Raises:
        TypeError: There is neither a tokenizer nor an id.
        ValueError: Both ids are the same.
    """

    def __init__(
        self,
        injection: Injection,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        meta_token_id: int | None = None,
        pad_token_id: int | None = None,
        seed: int = 0,
        ends_clause: BoolArray | None = None,
    ) -> None:
        self._meta_token_id = _find_id("meta_token_id", meta_token_id, tokenizer)
        self._pad_token_id = _find_id("pad_token_id", pad_token_id, tokenizer)
        if self._meta_token_id == self._pad_token_id:
            raise ValueError(f"pad_token_id must differ from meta_token_id {self._meta_token_id}")
        self._injection = injection
        self._tokenizer = tokenizer
        self._seed = seed
        if ends_clause is None and tokenizer is not None and injection.follows_punctuation:
            ends_clause = ends_clause_table(as_text_tokenizer(tokenizer))
        self._ends_clause = ends_clause

    def __call__(self, features: Sequence[Mapping[str, Any] | str]) -> dict[str, torch.Tensor]:
        """Return int64 tensors for the model.

        Returns:
            - input_ids (B, T), where T is the length of the longest row.
            - attention_mask (B, T), 1 at tokens and 0 at padding.
            - labels (B, T), by default the row's ids; -100 at meta-tokens, padding, tokens that a mask excludes and
                the first text token of each row.
            - meta_indices (B, M), only if every row has the same number M > 0 of meta-tokens.

        Raises:
            ValueError: There is no row, a row has no token, or a column cannot be moved with the tokens.
        """
        import torch

        if not features:
            raise ValueError("a batch needs at least one row")
        rows = [
            self._inject(_read_row(self._encode(feature) if isinstance(feature, str) else feature))
            for feature in features
        ]
        input_ids = _stack([row["input_ids"] for row in rows], filler=self._pad_token_id)
        attention_mask = _stack([row["attention_mask"] for row in rows], filler=0)
        is_meta = (input_ids == self._meta_token_id) & (attention_mask == 1)
        warn_without_meta_tokens(self._injection, int(is_meta.sum()), "a batch")
        labels = _stack([row["labels"] for row in rows], filler=IGNORE_INDEX)
        labels[is_meta] = IGNORE_INDEX
        first_text = ((attention_mask == 1) & ~is_meta).argmax(axis=1)
        labels[np.arange(len(rows)), first_text] = IGNORE_INDEX
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        num_meta = is_meta.sum(axis=1)
        if num_meta[0] > 0 and (num_meta == num_meta[0]).all():
            batch["meta_indices"] = np.nonzero(is_meta)[1].reshape(len(rows), -1)
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def _encode(self, text: str) -> Mapping[str, Any]:
        """Return a row of a text, in which the strings of special tokens are plain text."""
        if self._tokenizer is None:
            raise TypeError("a row that is a string needs the collator's tokenizer")
        return {"input_ids": self._encoder.encode_batch([text])[0]}

    @cached_property
    def _encoder(self) -> TextEncoder:
        assert self._tokenizer is not None
        return TextEncoder(self._tokenizer)

    def _inject(self, row: dict[str, IntArray]) -> dict[str, IntArray]:
        """Return the columns of one row with meta-tokens among its shown tokens."""
        shown, hidden = np.flatnonzero(row["attention_mask"]), np.flatnonzero(row["attention_mask"] == 0)
        text = row["input_ids"][shown].tolist()
        digest = hashlib.blake2b(f"{self._seed}:{text}".encode(), digest_size=8).digest()
        positions = sample_prompt_positions(
            text, self._injection, seed=int.from_bytes(digest, "little"), ends_clause=self._ends_clause
        )
        is_meta = np.zeros(len(shown) + len(positions), dtype=np.bool_)
        is_meta[positions] = True
        source = np.full(len(is_meta), shown[0] - 1)
        source[~is_meta] = shown
        # a meta-token directly follows the shown token before it, or precedes the first; hidden tokens keep their place
        places = np.maximum.accumulate(source) + 0.5 * is_meta
        order = np.argsort(np.concatenate([places, hidden]), kind="stable")
        source = np.concatenate([source, hidden])[order]
        is_meta = np.concatenate([is_meta, np.zeros(len(hidden), dtype=np.bool_)])[order]
        at_meta = {"input_ids": self._meta_token_id, "attention_mask": 1, "labels": IGNORE_INDEX}
        return {name: np.where(is_meta, at_meta[name], column[source]) for name, column in row.items()}


def _find_id(name: str, given: int | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    found = getattr(tokenizer, name, None) if given is None else given
    if not isinstance(found, int):
        raise TypeError(f"the collator needs a tokenizer of transformers that has a {name}, or {name} itself")
    return found


def _read_row(feature: Mapping[str, Any]) -> dict[str, IntArray]:
    """Return input_ids, attention_mask and labels (N,) int64 of a row, with its label masks applied to the labels."""
    if "input_ids" not in feature:
        raise ValueError(f"every row of a batch needs input_ids; found {', '.join(feature) or 'no column'}")
    for name in feature:
        if name not in CARRIED:
            raise ValueError(
                f"column {name} cannot be moved with the tokens: remove it, the collator takes {', '.join(CARRIED)}"
            )
    columns = {name: _read_column(name, values) for name, values in feature.items()}
    num_tokens = len(columns["input_ids"])
    for name, column in columns.items():
        if len(column) != num_tokens:
            raise ValueError(f"column {name} has {len(column)} values for the {num_tokens} tokens of its row")
    is_shown = columns.get("attention_mask", np.ones(num_tokens, dtype=np.int64)) != 0
    if not is_shown.any():
        raise ValueError("every row of a batch needs at least one token in input_ids that its attention_mask shows")
    labels = columns.get("labels", np.where(is_shown, columns["input_ids"], IGNORE_INDEX))
    for name in MASKS_OF_LABELS:
        if name in columns:
            labels = np.where(columns[name] != 0, labels, IGNORE_INDEX)
    return {"input_ids": columns["input_ids"], "attention_mask": is_shown.astype(np.int64), "labels": labels}


def _read_column(name: str, values: Any) -> IntArray:
    column = np.asarray(values)
    if column.ndim != 1 or (len(column) and column.dtype.kind not in "biu"):
        raise ValueError(f"column {name} must hold an integer for each token, not {str(values)[:40]!r}")
    return column.astype(np.int64)


def _stack(rows: Sequence[IntArray], *, filler: int) -> IntArray:
    """Stack rows of different lengths into (B, T), filled on the right."""
    lengths = np.array([len(row) for row in rows])
    is_filled = np.arange(lengths.max()) < lengths[:, None]
    stacked = np.full(is_filled.shape, filler, dtype=np.int64)
    stacked[is_filled] = np.concatenate(rows)
    return stacked
