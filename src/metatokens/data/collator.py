"""Rows of text tokens into padded batches with meta-tokens, for the Hugging Face Trainer.

The project's own training loop does not need this: its `loader` cuts equal blocks. Labels follow the Hugging Face
convention (not shifted) and amount to the loss policy skip. They are masked here and not in the model because the
Trainer counts the labels of an accumulated step before it calls the model.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.injection import IGNORE_INDEX, BoolArray, inject_into_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from metatokens.config.schema import Injection


class MetaTokenCollator:
    """Callable that makes a batch of rows `{"input_ids": [...]}` of text tokens, of any lengths.

    A row's layout depends on the seed and on the row's tokens only, not on the batch or the worker; a row that
    comes again has the same one.

    Args:
        injection: Policy of the meta-tokens; the ratio is of each row's result (see `inject_into_prompt`).
        meta_token_id: The id to put in; must be no text token.
        pad_token_id: The id that fills short rows on the right; must not be the meta-token.
        seed: Key of the layouts.
        ends_clause: (V,) bool, needed by the policy punctuation.
    """

    def __init__(
        self,
        injection: Injection,
        *,
        meta_token_id: int,
        pad_token_id: int,
        seed: int = 0,
        ends_clause: BoolArray | None = None,
    ) -> None:
        if meta_token_id == pad_token_id:
            raise ValueError(f"pad_token_id must differ from meta_token_id {meta_token_id}")
        self._injection = injection
        self._meta_token_id = meta_token_id
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._ends_clause = ends_clause

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors for the model.

        Returns:
            input_ids (B, T), T the longest row; attention_mask (B, T), 1 at tokens and 0 at padding; labels (B, T),
            the input ids with -100 at meta-tokens, padding and the first text token of each row; and
            meta_indices (B, M) if every row has the same number M > 0 of meta-tokens.

        Raises:
            ValueError: No row, or a row without a token.
        """
        import torch

        if not features or any(len(feature["input_ids"]) == 0 for feature in features):
            raise ValueError("every row of a batch needs at least one token in input_ids")
        rows = [self._inject([int(token) for token in feature["input_ids"]]) for feature in features]
        lengths = np.array([len(row) for row in rows])
        attention_mask = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(attention_mask.shape, self._pad_token_id, dtype=np.int64)
        input_ids[attention_mask] = np.concatenate(rows)
        is_meta = (input_ids == self._meta_token_id) & attention_mask
        labels = np.where(is_meta | ~attention_mask, IGNORE_INDEX, input_ids)
        first_text = (attention_mask & ~is_meta).argmax(axis=1)
        labels[np.arange(len(rows)), first_text] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }
        num_meta = is_meta.sum(axis=1)
        if num_meta[0] > 0 and (num_meta == num_meta[0]).all():
            batch["meta_indices"] = torch.from_numpy(np.nonzero(is_meta)[1].reshape(len(rows), -1))
        return batch

    def _inject(self, input_ids: list[int]) -> list[int]:
        digest = hashlib.blake2b(f"{self._seed}:{input_ids}".encode(), digest_size=8).digest()
        return inject_into_prompt(
            input_ids,
            self._injection,
            meta_token_id=self._meta_token_id,
            seed=int.from_bytes(digest, "little"),
            ends_clause=self._ends_clause,
        )
