"""The accuracy of guessing that each task states, against guesses on real instances."""

import random
import re
from collections import Counter
from collections.abc import Callable
from statistics import mean

import pytest

from metatokens.config.tasks import CopyingTask, ListPointerTask, ListRecallTask, ParityTask, SegmentCountingTask
from metatokens.tasks.base import Instance
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import TASKS, chance_of, task_names
from metatokens.tasks.words import ITEMS
from task_drawing import instance_of, word_encoder

INSTANCES, GUESSES = 800, 4


def guess_an_item(instance: Instance, dice: random.Random) -> str:
    return dice.choice(sorted(set(re.findall("[a-z]+", instance.prompt_text.partition("Item")[0])) & {*ITEMS}))


def guess_a_choice(instance: Instance, dice: random.Random) -> str:
    return dice.choice(instance.choices).strip()


def guess_a_stretch(instance: Instance, dice: random.Random) -> str:
    words = re.findall("[a-z]+", instance.prompt_text.partition(".")[0])[1:]
    length = len(instance.answers[0].split())
    words = [word for word in words if word in ITEMS]
    start = dice.randrange(len(words) - length)
    return " ".join(words[start : start + length])


GUESSERS: dict[str, Callable[[Instance, random.Random], str] | None] = {
    "list_recall": guess_an_item,
    "list_pointer": guess_a_choice,
    "copying": guess_a_stretch,
    "parity": lambda _, dice: dice.choice("01"),
    "segment_counting": None,  # always the answer that is right most often
}
CASES = {
    "list_recall": ListRecallTask(num_lists=(2, 4)),
    "list_pointer": ListPointerTask(num_lists=(2, 4)),
    "copying": CopyingTask(),
    "parity": ParityTask(),
    "segment_counting": SegmentCountingTask(num_items=3),
}


@pytest.mark.parametrize("name", task_names())
def test_guesses_are_right_as_often_as_the_task_states(name):
    assert GUESSERS.keys() == CASES.keys() == TASKS.keys(), "a new task needs a guesser here"
    task, dice = CASES[name], random.Random(3)
    size = (5, 5) if name == "segment_counting" else (1, 3)
    instances = [instance_of(task, size, prompt_tokens=(8, 64), index=index) for index in range(INSTANCES)]
    stated = mean(chance_of(instance, task) for instance in instances)
    guess = GUESSERS[name]
    if guess is None:
        right = Counter(instance.answers[0] for instance in instances).most_common(1)[0][1] / INSTANCES
    else:
        right = mean(guess(instance, dice) == instance.answers[0] for instance in instances for _ in range(GUESSES))
    spread = (stated * (1 - stated) / (INSTANCES * (1 if guess is None else GUESSES))) ** 0.5
    assert 0 < stated < 1
    assert abs(right - stated) < 3.5 * spread


def test_who_has_lost_a_span_of_few_symbols_guesses_each_of_its_words():
    task, dice = CopyingTask(symbols=3, distance=8), random.Random(4)
    instances = [instance_of(task, (2, 2), prompt_tokens=(20, 40), index=index) for index in range(INSTANCES)]
    right = [dice.choice(ITEMS[:3]) + " " + dice.choice(ITEMS[:3]) == instance.answers[0] for instance in instances]
    assert {chance_of(instance, task) for instance in instances} == {1 / 9}
    assert abs(mean(right) - 1 / 9) < 3.5 * (8 / 81 / INSTANCES) ** 0.5


def test_chance_travels_with_the_encoded_instance():
    task, encoder = ListRecallTask(num_lists=(2, 4)), word_encoder()
    instance = instance_of(task)
    encoded = encode_instance(instance, task, encoder=encoder, meta_token_id=encoder.vocab_size)
    assert (
        encoded.chance
        == chance_of(instance, task)
        == 1 / len(set(re.findall(r"\d+ (\w+)", "".join(instance.pieces[: instance.body_stop]))))
    )
