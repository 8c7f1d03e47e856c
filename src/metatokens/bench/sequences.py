"""The same text for all contenders of a training step: as many tokens to predict, from the same places."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatokens.config.bench import TrainingBench
from metatokens.config.schema import UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.model.loss import IGNORE_INDEX, targets_of_labels


class Sequences(NamedTuple):
    """Random text in three layouts. Each row predicts the same N - 1 tokens in all of them.

    Labels are aligned with the inputs; the first text token is never predicted, also where a meta-token stands before.
    """

    ids: Tensor
    """(B, T) int64 with M meta-tokens in each row."""
    labels: Tensor
    """(B, T) int64, -100 where nothing is predicted."""
    targets: Tensor
    """(B, T) int64: `labels`, shifted as the policy "skip" does."""
    meta_indices: Tensor
    """(B, M) int64."""
    filled_ids: Tensor
    """(B, T) int64: text in place of the meta-tokens, which is not predicted: `labels` hold for it too."""
    text_ids: Tensor
    """(B, N) int64: the text alone."""
    text_labels: Tensor
    """(B, N) int64."""

    @property
    def num_targets(self) -> int:
        """Tokens that the batch predicts."""
        return int((self.targets != IGNORE_INDEX).sum())


def make_sequences(settings: TrainingBench, meta_token_id: int) -> Sequences:
    """Draw a batch on the device of the settings; the same settings give the same batch."""
    injection = UniformInjection(ratio=settings.ratio)
    rows, length = settings.rows, settings.length
    positions = sample_meta_positions(injection, sample_ids=np.arange(rows), block_size=length, seed=0, epoch=0)
    random = np.random.default_rng(0)
    text = random.integers(settings.vocabulary, size=(rows, length - positions.shape[1] + 1))
    batch = inject_meta_tokens(text, positions, meta_token_id=meta_token_id, loss_policy="skip")
    ids = torch.from_numpy(batch.input_ids)
    is_meta = ids == meta_token_id
    labels = ids.masked_fill(is_meta, IGNORE_INDEX)
    labels[torch.arange(rows), (~is_meta).int().argmax(-1)] = IGNORE_INDEX
    text_labels = torch.from_numpy(text[:, :-1].copy())
    text_ids = text_labels.clone()
    text_labels[:, 0] = IGNORE_INDEX
    filler = torch.from_numpy(random.integers(settings.vocabulary, size=ids.shape))
    layouts = Sequences(
        ids=ids,
        labels=labels,
        targets=targets_of_labels(labels, is_meta, "skip"),
        meta_indices=torch.from_numpy(positions),
        filled_ids=torch.where(is_meta, filler, ids),
        text_ids=text_ids,
        text_labels=text_labels,
    )
    return Sequences(*(tensor.to(settings.device) for tensor in layouts))
