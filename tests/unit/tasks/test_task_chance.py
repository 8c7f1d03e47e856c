"""The accuracy of guessing that each task states, against guesses on real instances."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

import pytest
from pydantic import TypeAdapter

from metatokens.config.tasks import (
    CopyingTask,
    Difficulty,
    ListPointerTask,
    ListRecallTask,
    ParityTask,
    SegmentCountingTask,
    Task,
)
from metatokens.data.tokenizer import TextEncoder
from metatokens.tasks.base import Instance, PieceEncoder
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import TASKS, chance_of, make_instance, task_names
from metatokens.tasks.words import ITEMS
from metatokens.training.finetuning import word_tokenizer
from task_drawing import instance_of, word_encoder

INSTANCES, GUESSES = 800, 4
EXPERIMENTS = Path(__file__).parents[3] / "experiments"


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


def kept_chances() -> Iterator[tuple[str, Task, Difficulty, int, float]]:
    """Yield the first number of guessing of each task of each kept result, with what it is of."""
    read = TypeAdapter[Task](Task).validate_python
    for path in sorted(EXPERIMENTS.glob("tiny-recall/*results.json")):
        results = json.loads(path.read_text())
        for name, axis in results["sweep"]["axes"]["task"].items():
            rows = next(cell for cell in results["cells"] if cell["labels"]["task"] == name)["evaluations"][0]["rows"]
            difficulty = Difficulty(size=rows[0]["size"], prompt_tokens=rows[0]["prompt_tokens"])
            yield f"{path.stem} {name}", read(axis["task"]), difficulty, rows[0]["instances"], rows[0]["chance"]
    for name in ("list_recall", "parity"):
        results = json.loads((EXPERIMENTS / "tiny-analysis" / name / "results.json").read_text())
        subject, documents = results["config"]["subject"], results["config"]["documents"]
        (chance,) = [one["value"] for one in results["records"] if one["measure"] == "chance" and not one["at"]]
        yield f"analysis {name}", read(subject["task"]), Difficulty(**subject["difficulty"]), documents, chance


@pytest.mark.parametrize("kept", kept_chances(), ids=lambda kept: kept[0])
def test_kept_results_state_the_guessing_of_their_tasks(kept: tuple[str, Task, Difficulty, int, float]) -> None:
    _, task, difficulty, number, chance = kept
    encoder = PieceEncoder(TextEncoder(word_tokenizer()))
    drawn = (
        make_instance(task, difficulty, encoder=encoder, seed=0, split="test", index=index) for index in range(number)
    )
    assert mean(chance_of(instance, task) for instance in drawn) == pytest.approx(chance)
