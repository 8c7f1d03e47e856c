"""Recall against the task's own size."""

import pytest

from analysis_inputs import TASK, records_of, task_inputs
from metatokens.config.tasks import Difficulty
from task_models import task_lens


@pytest.mark.parametrize(("size", "sizes"), [((2, 3), [2, 3, 4, 5, 6]), ((20, 20), [])])
def test_recall_by_size_goes_beyond_the_sizes_that_were_asked(size, sizes):
    difficulty = Difficulty(size=size, prompt_tokens=(20, 60))
    inputs = task_inputs(task_lens().model, subject=TASK.model_copy(update={"difficulty": difficulty}))
    found = records_of("capacity", inputs)
    assert [one.at["size"] for one in found] == sizes
    assert all(one.num_documents == 8 for one in found)
    guessed = {one.at.get("size"): one.value for one in records_of("chance", inputs)}
    assert list(guessed) == [None, *sizes]
    # there are at least two lists, and the items of one differ
    assert all(0 < guessed[size] <= 1 / size for size in sizes)
    assert any("no prompt of these lengths" in line for line in inputs.skipped) == (not sizes)
