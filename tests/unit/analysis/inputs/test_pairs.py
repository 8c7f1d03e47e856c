"""Minimal pairs differ in one item and in their answer, and in nothing else."""

import re

import numpy as np
import pytest

from metatokens.analysis.inputs.pairs import MinimalPair, make_minimal_pairs, replace_item
from metatokens.config.tasks import (
    CopyingTask,
    Difficulty,
    ListPointerTask,
    ListRecallTask,
    ParityTask,
    SegmentCountingTask,
    Task,
    UniformPlaces,
)
from metatokens.errors import UsageError
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.registry import TASKS, make_instance
from task_drawing import byte_encoder, word_encoder

DIFFICULTY = Difficulty(size=(3, 6), prompt_tokens=(20, 220))
KINDS = [ListRecallTask, ListPointerTask, CopyingTask, SegmentCountingTask, ParityTask]
SOLVERS = {kind: TASKS[kind().kind].solve for kind in KINDS}


def pairs_of(task: Task, count: int = 20, *, encoder: PieceEncoder | None = None, seed: int = 0) -> list[MinimalPair]:
    encoder = word_encoder() if encoder is None else encoder
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size}
    return make_minimal_pairs(task, DIFFICULTY, seed=seed, pairs=count, **special)


def text_of(ids: np.ndarray, encoder: PieceEncoder) -> str:
    tokenizer = encoder.text_encoder._encoders.plain  # the tokenizer that the encoder was made of
    return tokenizer.decode([int(i) for i in ids if i != encoder.vocab_size])


@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize("encoder", [word_encoder, byte_encoder], ids=["words", "bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_pair_differ_within_one_item_and_have_one_layout(kind, encoder, questions):
    encoder = encoder()
    for pair in pairs_of(kind(questions=questions), 8, encoder=encoder):
        assert pair.clean.shape == pair.corrupt.shape
        differs = np.flatnonzero(pair.clean != pair.corrupt)
        assert len(differs)
        assert set(differs) <= set(pair.item_positions)
        assert pair.answer != pair.foil
        for row in (pair.clean, pair.corrupt):
            assert np.array_equal(np.flatnonzero(row == encoder.vocab_size), pair.meta_positions)
        assert pair.item_positions[-1] < pair.question_start < len(pair.clean)


@pytest.mark.parametrize("kind", KINDS)
def test_answer_and_foil_are_what_the_solver_says_of_each_row(kind):
    encoder = word_encoder()
    for pair in pairs_of(kind()):
        for row, token in ((pair.clean, pair.answer), (pair.corrupt, pair.foil)):
            prompt, start = text_of(row, encoder), pair.question_start
            shared = text_of(row[start:], encoder).partition(":")[2] if kind is CopyingTask else ""
            (answer,) = SOLVERS[kind](prompt)
            answered = answer.split()[len(shared.split())]
            assert encoder.ids(f" {answered}") == (token,)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_a_prefix_are_a_prefix_of_the_pairs_and_seeds_differ(kind):
    few, many, others = pairs_of(kind(), 3), pairs_of(kind(), 6), pairs_of(kind(), 3, seed=1)
    for one, same in zip(few, many, strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(len(a.clean) != len(b.clean) or (a.clean != b.clean).any() for a, b in zip(few, others, strict=True))
    assert len({pair.clean.tobytes() for pair in many}) == 6


@pytest.mark.parametrize("kind", [ListRecallTask, ListPointerTask, CopyingTask])
def test_answer_and_foil_occur_equally_often_in_their_own_body(kind):
    for pair in pairs_of(kind()):
        item = pair.item_positions
        clean, corrupt = (np.delete(row[: pair.question_start], item) for row in (pair.clean, pair.corrupt))
        assert not set(pair.clean[item]) & set(clean)
        assert not set(pair.corrupt[item]) & set(corrupt)


def test_counts_of_a_pair_differ_by_one_in_either_direction():
    encoder = word_encoder()
    numbers = {encoder.ids(f" {number}")[0]: number for number in range(30)}
    steps = [numbers[pair.foil] - numbers[pair.answer] for pair in pairs_of(SegmentCountingTask(num_items=3), 40)]
    assert set(steps) == {-1, 1}


def test_every_place_of_the_item_is_drawn():
    pairs = pairs_of(ParityTask(), 40)
    assert {int(pair.item_positions[0]) for pair in pairs} >= {2, 3, 4}
    assert {pair.answer for pair in pairs} == {word_encoder().ids(f" {bit}")[0] for bit in (0, 1)}


def test_both_instances_are_of_the_test_split():
    encoder, task = word_encoder(), ListRecallTask()
    any_instance = make_instance(task, DIFFICULTY, encoder=encoder, seed=0, split="test", index=0)
    for pair in pairs_of(task, 10, encoder=encoder):
        for row in (pair.clean, pair.corrupt):
            first, *words = re.findall(r"\w+", text_of(row[: pair.question_start], encoder))
            body = (first, *(f" {word}" for word in words))
            assert any_instance._replace(pieces=body, body_stop=len(body)).split == "test"


def test_uniform_places_are_the_same_in_both_rows():
    encoder = word_encoder()
    task = ListRecallTask(meta_places=UniformPlaces(meta_ratio=0.3))
    for pair in pairs_of(task):
        assert len(pair.meta_positions) > 5
        assert (pair.later_meta_positions > pair.item_positions[-1]).all()
        assert len(pair.later_meta_positions) == (pair.clean[pair.item_positions[-1] :] == encoder.vocab_size).sum()


def test_an_item_replaced_changes_what_depends_on_it():
    encoder, task = word_encoder(), ListRecallTask(questions=2)
    instance = make_instance(task, DIFFICULTY, encoder=encoder, seed=0, split="test", index=0)
    place = instance.pieces.index(f" {instance.answers[0]}")
    changed = replace_item(instance, place, " zebra", SOLVERS[ListRecallTask])
    assert changed is not None
    assert changed.answers == ("zebra", instance.answers[1])
    assert changed.text == instance.text.replace(instance.answers[0], "zebra")


def test_a_task_without_pairs_is_one_line():
    task = SegmentCountingTask(num_items=1)
    with pytest.raises(UsageError, match="minimal pairs of segment_counting: expected an instance"):
        pairs_of(task, 1)


def test_pairs_of_a_text_that_does_not_tell_the_answer_are_refused():
    with pytest.raises(UsageError, match=r"task\.marks true"):
        pairs_of(ParityTask(marks=False), 1)
