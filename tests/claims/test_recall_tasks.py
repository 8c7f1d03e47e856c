"""The paper's recall tasks (section 3), and what this implementation promises on top of them.

The prompt alone determines the answer, and no training prompt is a test prompt.
"""

import re
from itertools import product

import pytest

from metatokens.config.tasks import CopyingTask, ListPointerTask, ListRecallTask, ParityTask, SegmentCountingTask
from metatokens.tasks.registry import find_task, task_names
from task_drawing import byte_encoder, instance_of, word_encoder

LISTS = ({"questions": 1}, {"questions": 6, "numbered": False}, {"questions": 2, "num_lists": (1, 3)})
CONFIGS = {
    "list_recall": [ListRecallTask(**fields) for fields in LISTS],
    "list_pointer": [ListPointerTask(**fields) for fields in LISTS],
    "segment_counting": [SegmentCountingTask(num_items=6, **fields) for fields in LISTS],
    "parity": [ParityTask(questions=questions) for questions in (1, 2, 4)],
    "copying": [CopyingTask(questions=questions) for questions in (1, 2, 4)],
}
# size, prompt, encoder, instances of each config: 3,334 of each config, 10,002 of each task
GRID = (
    ((4, 8), (1, 150), word_encoder, 2_500),
    ((4, 6), (1, 200), word_encoder, 680),
    ((4, 6), (1, 600), byte_encoder, 100),
    ((8, 12), (257, 512), word_encoder, 40),
    ((6, 24), (513, 1024), word_encoder, 14),
)


def body_words(text: str) -> tuple[str, ...]:
    """Return the words and numbers of a text before its first question."""
    body = re.split(r" (?:Item|Point|Count|Parity|Copy) ", text)[0]
    return tuple(re.findall(r"[a-z]+|\d+", body.lower()))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", task_names())
def test_solver_answers_ten_thousand_instances_from_the_prompt_alone(name):
    solve = find_task(name).solve
    num_instances = 0
    for task, (size, (lowest, highest), make_encoder, count) in product(CONFIGS[name], GRID):
        has_few_lists = getattr(task, "num_lists", (2, 200))[1] == 3  # which do not fill a long bin
        room = (1 if has_few_lists else lowest, highest)
        for index in range(count):
            instance = instance_of(task, size, room, encoder=make_encoder(), seed=5, index=index)
            assert solve(instance.prompt_text) == list(instance.answers), instance.prompt_text
            num_instances += 1
    assert num_instances >= 10_000


@pytest.mark.parametrize("name", task_names())
def test_solver_answers_prompts_of_both_splits(name):
    for task, split, index in product(CONFIGS[name], ("train", "test"), range(30)):
        instance = instance_of(task, (4, 8), (1, 200), split=split, index=index)
        assert find_task(name).solve(instance.prompt_text) == list(instance.answers)


@pytest.mark.parametrize("name", task_names())
def test_every_answer_comes_up(name):
    answers = {instance_of(CONFIGS[name][0], (4, 8), (1, 150), index=index).answers[0] for index in range(200)}
    assert len(answers) >= {"parity": 2, "segment_counting": 4}.get(name, 100)


def test_parity_is_a_fair_coin():
    ones = sum(int(instance_of(ParityTask(), (8, 16), (1, 80), index=index).answers[0]) for index in range(1_000))
    assert abs(ones - 500) < 4 * 250**0.5


@pytest.mark.parametrize("name", task_names())
def test_training_and_test_share_no_body_whatever_the_seed_and_the_settings(name):
    # so few tokens that both splits come back to the same contents again and again
    size, prompt_tokens = {"parity": ((3, 4), (1, 14)), "copying": ((1, 1), (9, 10))}.get(name, ((1, 1), (1, 22)))
    contents = {"train": set(), "test": set()}
    num_drawn = {"train": 700, "test": 150}
    for split, seed in product(contents, (0, 1)):
        changes = {"meta_places": {"kind": "none"}, "loss": "full"} if seed else {}
        if name not in {"parity", "copying"}:
            changes["num_lists"] = (1, 1)
        task = find_task(name).config(**changes)
        for index in range(num_drawn[split]):
            text = instance_of(task, size, prompt_tokens, seed=seed, split=split, index=index).text
            contents[split].add(body_words(text))
    assert contents["train"].isdisjoint(contents["test"])
    assert all(contents.values())
    if name == "parity":
        # the splits are crowded: without the rule they would share nearly all
        assert len(contents["train"]) + len(contents["test"]) < 300


@pytest.mark.parametrize("name", task_names())
def test_a_tenth_of_all_contents_is_the_test_split(name):
    task = find_task(name).config()
    trained = [instance_of(task, split="train", index=index) for index in range(50)]
    tested = [instance_of(task, split="test", index=index) for index in range(50)]
    assert {instance.split for instance in trained} == {"train"}
    assert {instance.split for instance in tested} == {"test"}
    variants = [
        instance._replace(pieces=("List", f" number{number}", *instance.pieces[1:]), body_stop=instance.body_stop + 1)
        for number, instance in enumerate(trained * 40)
    ]
    share = sum(variant.split == "test" for variant in variants) / len(variants)
    assert abs(share - 0.1) < 4 * (0.09 / len(variants)) ** 0.5


def test_same_body_with_other_marks_or_questions_is_on_the_same_side():
    for index in range(50):
        instance = instance_of(CopyingTask(questions=2), index=index)
        words = [piece for piece in instance.pieces[: instance.body_stop] if piece.strip(" _").isalpha()]
        plain = instance._replace(pieces=(*words, *instance.pieces[instance.body_stop :]), body_stop=len(words))
        assert plain.split == instance.split
