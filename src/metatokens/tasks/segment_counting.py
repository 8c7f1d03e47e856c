"""Segment counting (paper section 3): how often does an item occur in a marked segment of a list?

The segment lies in one list, between two meta-tokens; nothing else is marked, and there is none before a question.

Input, and targets for the two kinds of loss:

    input  List   knight :      cheese ,      cheese , _ [      cheese , _ ]      cheese .    List  canal
    answer -      -      -      -      -      -      - - -      -      - - -      -      -    -     -
    full   knight :      cheese ,      cheese ,      - [ cheese ,      - ] cheese .      List canal :

    input  :    sofa ,      cheese ,    sofa ,    sofa .     Count of     cheese is 1 .     Count of   sofa
    answer -    -    -      -      -    -    -    -    -     -     -      -      1  - -     -     -    -
    full   sofa ,    cheese ,      sofa ,    sofa .    Count of    cheese is     1  . Count of    sofa is

    input  is 0
    answer 0  -
    full   0  -

The meta-tokens mark the segment, and a bracket stands right after each for models without them. With `meta_places`
every, a meta-token stands after each list; with decoy, at the ends of another segment, drawn independently. The
brackets stay in both cases; without `marks` there are none. The answer is a number in digits, 0 included. The items of
a prompt are `num_items` different words, and each question asks for a different one.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING

from metatokens.data.keyed_random import KeyedRandom
from metatokens.tasks.base import (
    Instance,
    LengthRange,
    PieceEncoder,
    Question,
    assemble,
    count_question_tokens,
    mark_places,
)
from metatokens.tasks.lists import NamedList, draw_items, draw_names, draw_other_lists, items_of, write_lists

if TYPE_CHECKING:
    from metatokens.config.tasks import SegmentCountingTask


def generate(
    task: SegmentCountingTask, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
) -> Instance | None:
    """Draw lists of `size` items, the segment and the questions; None if the prompt misses the range."""
    names = draw_names(task, random)
    words = draw_items(task.num_items, random, key="segment_counting.num_items")

    def draw_list() -> NamedList:
        return NamedList(next(names), [random.choose(words) for _ in range(size)])

    target = draw_list()
    start, stop = _draw_segment(size, random)
    order = random.shuffle(words)
    counted = [next(order) for _ in range(task.questions)]
    questions = [
        Question([" Count", " of", f" {word}", " is"], [f" {target.items[start:stop].count(word)}"]) for word in counted
    ]
    used = count_question_tokens(questions, encoder) + encoder.count((" [", " ]"))
    drawn = draw_other_lists(task, target, draw_list, length_range, used=used, encoder=encoder, random=random)
    if drawn is None:
        return None
    lists, target_index = drawn
    decoys = None
    if task.meta_places.kind == "every":
        decoys = [(index, size) for index in range(len(lists))]
    elif task.meta_places.kind == "decoy":
        index = random.below(len(lists))
        decoys = [(index, end) for end in _draw_segment(size, random)]
    inserted = mark_places(task, [((target_index, start), " ["), ((target_index, stop), " ]")], decoys)
    return assemble(write_lists(lists, inserted, numbered=task.numbered), questions)


def solve(prompt_text: str) -> list[str]:
    """Return the answer to each question of a prompt, from the text alone."""
    inside = prompt_text.partition("[")[2].partition("]")[0]
    words = re.findall(r"[a-z]+", inside)
    return [str(words.count(item)) for item in re.findall(r"Count of (\w+) is", prompt_text)]


def chance(task: SegmentCountingTask, instance: Instance) -> float:
    """Return the share of right answers of always giving the most frequent count, for lists of this size."""
    words = items_of(instance)
    first_list = instance.pieces[: instance.pieces.index(".")]
    return _share_of_most_frequent(sum(piece in words for piece in first_list), task.num_items)


@cache
def _share_of_most_frequent(size: int, num_items: int) -> float:
    """Return the largest probability of a count: binomial in a segment whose length is uniform from 1 to `size`."""
    hit = 1 / num_items
    counts = [0.0] * (size + 1)
    for length in range(1, size + 1):
        for count in range(length + 1):
            counts[count] += math.comb(length, count) * hit**count * (1 - hit) ** (length - count) / size
    return max(counts)


def _draw_segment(size: int, random: KeyedRandom) -> tuple[int, int]:
    """Return (start, stop) of a segment of at least one item, its length drawn before its place."""
    num_inside = random.between(1, size)
    start = random.below(size - num_inside + 1)
    return start, start + num_inside
