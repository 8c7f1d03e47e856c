"""Settings of the recall tasks: bins by name, and every wrong one is an error that names it."""

import pytest
from pydantic import TypeAdapter, ValidationError

from metatokens.config.tasks import (
    LENGTH_BINS,
    Difficulty,
    SegmentCountingTask,
    Task,
    UniformPlaces,
    length_bin,
)
from metatokens.errors import UsageError
from metatokens.tasks.registry import TASKS, find_task, task_names

TASK = TypeAdapter(Task)


def test_bins_follow_one_another_up_to_the_papers_longest():
    bounds = list(LENGTH_BINS.values())
    assert [highest for _, highest in bounds] == [128, 256, 512, 1024, 2048]
    assert [lowest for lowest, _ in bounds] == [1, *(highest + 1 for _, highest in bounds[:-1])]


@pytest.mark.parametrize(
    ("name", "bounds"), [("extra-hard", (513, 1024)), ("2049-4096", (2049, 4096)), ("7-7", (7, 7))]
)
def test_bin_is_found_by_its_name_or_its_bounds(name, bounds):
    assert length_bin(name) == bounds
    assert Difficulty(size=(1, 2), prompt_tokens=name).prompt_tokens == bounds


@pytest.mark.parametrize(
    ("name", "hint"), [("extrahard", "'extra-hard'"), ("9-3", "range"), ("0-5", "range"), ("", "easy")]
)
def test_unknown_bin_is_a_usage_error_that_names_what_there_is(name, hint):
    with pytest.raises(UsageError, match=r"length bin: expected .*easy.*found") as caught:
        length_bin(name)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (3, 2), "prompt_tokens": "easy"},
        {"size": (0, 2), "prompt_tokens": "easy"},
        {"size": (1, 2), "prompt_tokens": (9, 8)},
        {"size": (1, 2), "prompt_tokens": "esy"},
        {"size": (1, 2)},
        {"size": (1, 2), "prompt_tokens": "easy", "length": 3},
    ],
)
def test_difficulty_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=r"^Difficulty"):
        Difficulty(**fields)


def test_misspelt_bin_in_a_difficulty_comes_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'medium'"):
        Difficulty(size=(1, 2), prompt_tokens="meduim")


@pytest.mark.parametrize("name", task_names())
def test_task_round_trips_through_its_fields(name):
    task = find_task(name).config(questions=3, meta_places={"kind": "uniform", "meta_ratio": 0.2}, loss="full")
    assert task.meta_places == UniformPlaces(meta_ratio=0.2)
    assert TASK.validate_python(task.model_dump()) == task
    assert TASK.validate_json(task.model_dump_json()) == task


def test_every_task_of_the_schema_is_registered_under_its_kind():
    assert {name: parts.config.model_fields["kind"].default for name, parts in TASKS.items()} == {n: n for n in TASKS}
    assert set(TASK.json_schema()["discriminator"]["mapping"]) == set(task_names())


def test_questions_beyond_the_items_of_a_segment_name_both_keys():
    with pytest.raises(ValueError, match=r"questions 3 .* num_items 2"):
        SegmentCountingTask(questions=3, num_items=2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "parity", "meta_places": {"kind": "every"}}, "every"),
        ({"kind": "copying", "marks": False, "meta_places": {"kind": "none"}}, "nothing would tell"),
        ({"kind": "segment_counting", "marks": False, "meta_places": {"kind": "decoy"}}, "nothing would tell"),
        ({"kind": "list_recall", "marks": True, "meta_places": {"kind": "uniform"}}, "between tokens"),
    ],
)
def test_places_and_marks_that_make_no_task_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        TASK.validate_python(fields)


@pytest.mark.parametrize(
    ("name", "nearest"), [("list_recal", "list_recall"), ("segment", "segment_counting"), ("Copying", "copying")]
)
def test_unknown_task_comes_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match="task must be one of") as caught:
        find_task(name)
    assert f"did you mean {nearest!r}?" in str(caught.value)
    assert "\n" not in str(caught.value)
