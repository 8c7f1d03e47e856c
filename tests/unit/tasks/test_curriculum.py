"""The curriculum's lookup, and batches that are a pure function of the step."""

import numpy as np
import pytest

from metatokens.config.finetuning import FinetuneConfig, Stage
from metatokens.config.tasks import CopyingTask
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.curriculum import RecallBatches, locate
from metatokens.tasks.encoding import RecallBatch, encode_instance
from metatokens.tasks.registry import make_instance

STAGES = (
    Stage(steps=3, size=(2, 3), prompt_tokens=(1, 200)),
    Stage(steps=5, size=(2, 4), prompt_tokens=(1, 400)),
)


@pytest.fixture(scope="module")
def encoder() -> PieceEncoder:
    return PieceEncoder(TextEncoder(train_tokenizer(["one two three"], 260)))


def batches(encoder: PieceEncoder, *, rank: int = 0, world_size: int = 1, **changes: object) -> RecallBatches:
    fields = {"task": CopyingTask(), "curriculum": STAGES, "train_instances": None, "bucket_batches": 2}
    config = FinetuneConfig(**{**fields, **changes}, training={"batch_blocks": 4, "micro_batch_blocks": 4})
    special = {"meta_token_id": encoder.vocab_size, "pad_token_id": encoder.vocab_size + 1}
    return RecallBatches(config, encoder, **special, rank=rank, world_size=world_size)


def rows_of(batch: RecallBatch, encoder: PieceEncoder) -> list[bytes]:
    return [row[row != encoder.vocab_size + 1].tobytes() for row in batch.input_ids]


def test_each_step_lies_in_one_stage():
    assert [locate(STAGES, step) for step in range(8)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
    ]
    with pytest.raises(ValueError, match="step 8 lies beyond the 8 steps"):
        locate(STAGES, 8)


def test_a_batch_is_a_function_of_the_step_alone(encoder: PieceEncoder):
    forward, backward = batches(encoder), batches(encoder)
    ahead = [forward.batch_at(step) for step in range(8)]
    for step in reversed(range(8)):
        np.testing.assert_array_equal(backward.batch_at(step).input_ids, ahead[step].input_ids)
        np.testing.assert_array_equal(backward.batch_at(step).targets, ahead[step].targets)


def test_the_ranks_rows_together_are_the_batch_of_one_process(encoder: PieceEncoder):
    for step in range(8):
        whole = rows_of(batches(encoder).batch_at(step), encoder)
        parts = [rows_of(batches(encoder, rank=rank, world_size=2).batch_at(step), encoder) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_the_record_of_a_batch_names_its_instances_on_every_rank(encoder: PieceEncoder):
    task, split = CopyingTask(), "train"
    for step in range(8):
        loader = batches(encoder, rank=1, world_size=2)
        ids = loader.sample_ids(step)
        stage = STAGES[locate(STAGES, step).stage]
        instances = [
            make_instance(task, stage.difficulty, encoder=encoder, seed=0, split=split, index=index) for index in ids
        ]
        encoded = [encode_instance(one, task, encoder=encoder, meta_token_id=encoder.vocab_size) for one in instances]
        assert [row.input_ids.tobytes() for row in encoded] == rows_of(batches(encoder).batch_at(step), encoder)


def test_no_instance_comes_twice_without_a_limit(encoder: PieceEncoder):
    rows = [row for step in range(8) for row in rows_of(batches(encoder).batch_at(step), encoder)]
    assert len(set(rows)) == len(rows) == 32


def test_a_limited_set_is_shared_out_over_the_stages_and_seen_evenly(encoder: PieceEncoder):
    limited = batches(encoder, train_instances=8)
    stages = (
        [row for step in steps for row in rows_of(limited.batch_at(step), encoder)] for steps in (range(3), range(3, 8))
    )
    first, second = stages
    assert [len(set(first)), len(set(second))] == [3, 5]
    assert {first.count(row) for row in first} == {4}
    assert {second.count(row) for row in second} == {4}


def test_rows_of_a_batch_are_about_equally_long(encoder: PieceEncoder):
    def padding(bucket_batches: int) -> float:
        loader = batches(
            encoder, bucket_batches=bucket_batches, curriculum=(Stage(steps=8, size=(2, 4), prompt_tokens=(1, 400)),)
        )
        all_batches = [loader.batch_at(step) for step in range(8)]
        return sum(batch.input_ids.size - batch.num_text - batch.num_meta for batch in all_batches)

    assert padding(8) < padding(1) / 2


def test_instances_are_no_others_because_a_stage_takes_longer(encoder: PieceEncoder):
    longer = batches(encoder, curriculum=(STAGES[0].model_copy(update={"steps": 4}), STAGES[1]))
    assert sorted(
        rows_of(batches(encoder).batch_at(0), encoder) + rows_of(batches(encoder).batch_at(1), encoder)
    ) == sorted(rows_of(longer.batch_at(0), encoder) + rows_of(longer.batch_at(1), encoder))
