"""Recall by the number of items is recall with lists of that size."""

import pytest

from metatokens.analysis.capacity import recall_by_items
from metatokens.config.finetuning import EvaluateConfig
from metatokens.config.tasks import ListRecallTask
from metatokens.errors import UsageError
from metatokens.evaluation.recall import evaluate_recall
from task_drawing import word_encoder
from tiny_models import tiny_model


def test_each_number_of_items_is_an_evaluation_at_that_size():
    encoder = word_encoder()
    size = encoder.vocab_size
    model = tiny_model(
        vocab_size=size + 2, meta_token_id=size, pad_token_id=size + 1, eos_token_id=0, max_position_embeddings=128
    )
    config = EvaluateConfig(task=ListRecallTask(), lengths=("20-60",), instances=6)
    rows = recall_by_items([model], config, encoder, items=(2, 5))
    for number in (2, 5):
        ((row,), expected) = rows[number], config.model_copy(update={"size": (number, number)})
        assert row.size == (number, number)
        assert (row,) == evaluate_recall([model], expected, encoder)
    with pytest.raises(UsageError, match="size 60-60"):
        recall_by_items([model], config, encoder, items=(60,))
