"""What a task is: a function that draws a case, the sentences to hide and the question about them.

A case says nothing of length: `items` puts as much filler between its sentences as a length leaves room for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metatokens.data.keyed_random import KeyedRandom
from metatokens.errors import UsageError
from metatokens.evaluation.long_context.material import Material, Story
from metatokens.names import nearest_name
from metatokens.tasks.words import ITEMS, NAMES


@dataclass(frozen=True)
class Case:
    """One text of a task, but for its filler."""

    before: str
    """Opens the prompt."""
    hidden: tuple[str, ...]
    """Sentences that go into the filler, in this order, at places drawn evenly."""
    after: str
    """Ends the prompt; the answer follows without a seam."""
    answer: str
    """What the model must write, with the space before it."""
    needed: int = 0
    """Which of the hidden sentences tells the answer, for the depth of an item."""


Draw = Callable[[KeyedRandom, Material], Case]
"""Draws a case; a pure function of the stream and the material."""


@dataclass(frozen=True)
class LongContextTask:
    """A registered task."""

    name: str
    draw: Draw
    hides_in: Literal["haystack", "books"]
    """Its filler: that of the config, or books always."""
    story: int | None
    """The bAbI task whose stories it needs."""

    @property
    def key(self) -> int:
        """The name as a number, part of the key of its draws."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


TASKS: dict[str, LongContextTask] = {}
"""By name, in the order of the files."""


def task(
    name: str, *, hides_in: Literal["haystack", "books"] = "haystack", story: int | None = None
) -> Callable[[Draw], Draw]:
    """Register the decorated function as a task."""

    def register(draw: Draw) -> Draw:
        TASKS[name] = LongContextTask(name, draw, hides_in, story)
        return draw

    return register


def find_task(name: str) -> LongContextTask:
    """Return a task by its name.

    Raises:
        UsageError: there is none; the message has the nearest name.
    """
    if name not in TASKS:
        remedy = nearest_name(name, TASKS) or "name one of them"
        raise UsageError("tasks", expected=f"some of {', '.join(TASKS)}", found=repr(name), remedy=remedy)
    return TASKS[name]


# what several tasks draw --------------------------------------------------------------------------------------


def draw_keys(draw: KeyedRandom, count: int) -> list[str]:
    """Return different names, such as castle-apple."""
    places, things = draw.shuffle(NAMES), draw.shuffle(ITEMS)
    return [f"{next(places)}-{next(things)}" for _ in range(count)]


def draw_numbers(draw: KeyedRandom, count: int, digits: int) -> list[str]:
    """Return `count` different numbers, each with `digits` digits."""
    numbers: list[str] = []
    while len(numbers) < count:
        number = str(draw.between(10 ** (digits - 1), 10**digits - 1))
        if number not in numbers:
            numbers.append(number)
    return numbers


def draw_story(draw: KeyedRandom, material: Material, number: int) -> Story:
    """Return a question of a bAbI task with the facts before it."""
    return draw.choose(material.stories(number))
