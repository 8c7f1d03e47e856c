"""Scores of minimal pairs are those of the logits."""

import pytest
import torch

from circuits import random_lens
from metatokens.analysis.inputs.pairs import make_minimal_pairs
from metatokens.analysis.inputs.scores import Scores, batches_of
from metatokens.config.tasks import Difficulty, ListRecallTask, NoPlaces
from task_drawing import word_encoder


def test_scores_are_those_of_the_logits():
    logits = torch.tensor([[1.0, 3.0, 0.0, 9.0], [2.0, 1.0, 0.0, 9.0]], dtype=torch.float64)
    scores = Scores.of_logits(logits, torch.tensor([1, 1]), torch.tensor([0, 2]), meta_token_id=3)
    assert scores.logit_difference.tolist() == [2, 1]
    assert scores.accuracy.tolist() == [1, 0]
    assert scores.cross_entropy == pytest.approx(-logits.log_softmax(-1)[:, 1].numpy(), abs=1e-6)


def test_pairs_without_a_meta_token_behind_the_item_are_refused():
    encoder = word_encoder()
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size, "seed": 0}
    plain = make_minimal_pairs(
        ListRecallTask(meta_places=NoPlaces()), Difficulty(size=(2, 4), prompt_tokens=(10, 60)), pairs=2, **special
    )
    with pytest.raises(ValueError, match="none of 2 minimal pairs has a meta-token behind its item"):
        next(batches_of(random_lens(), plain))
