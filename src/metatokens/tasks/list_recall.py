"""List recall (paper section 3): which is item j of a named list?

A meta-token stands right after the list that holds the queried items and one before each question, so two stand
together where that list is the last. Items of one list differ; lists may share items.

That place gives the list away: a model that looks at the list before the first meta-token need not read its name. With
`meta_places` every, a meta-token stands after each list; with decoy, after a list drawn independently of the question.
Neither says anything about the question. `marks` writes a bar after each place, for models without meta-tokens.

Input, and targets for the two kinds of loss:

    input  List  child : 1    corn , 2   jar . _    List    student : 1     canoe , 2       feather . _
    answer -     -     - -    -    - -   -   - -    -       -       - -     -     - -       -       - -
    full   child :     1 corn ,    2 jar .   - List student :       1 canoe ,     2 feather .       - Item

    input  Item 1  of    child is   corn . _    Item 2  of    child is  jar
    answer -    -  -     -     corn -    - -    -    -  -     -     jar -
    full   1    of child is    corn .    - Item 2    of child is    jar -

Several questions ask for different items of the same list, and start over once each item has had its question.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from metatokens.data.keyed_random import KeyedRandom
from metatokens.tasks.base import META, Instance, LengthRange, PieceEncoder, Question, assemble, count_question_tokens
from metatokens.tasks.lists import NamedList, draw_items, draw_names, draw_other_lists, items_of, write_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from metatokens.config.tasks import ListPointerTask, ListRecallTask


def generate(
    task: ListRecallTask, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
) -> Instance | None:
    """Draw lists of `size` items and the questions; None if the prompt misses the range."""
    return generate_recall(task, size, length_range, word_question=_word_question, encoder=encoder, random=random)


def generate_recall(
    task: ListRecallTask | ListPointerTask,
    size: int,
    length_range: LengthRange,
    *,
    word_question: Callable[[int, str], list[str]],
    encoder: PieceEncoder,
    random: KeyedRandom,
) -> Instance | None:
    """Draw an instance whose questions are worded by `word_question(number, name)`."""
    names = draw_names(task, random)

    def draw_list() -> NamedList:
        return NamedList(next(names), draw_items(size, random, key="difficulty.size"))

    target = draw_list()
    numbers = [number for _ in range(0, task.questions, size) for number in random.shuffle(range(1, size + 1))]
    questions = [
        Question(word_question(number, target.name), [f" {target.items[number - 1]}"])
        for number in numbers[: task.questions]
    ]
    used = count_question_tokens(questions, encoder)
    drawn = draw_other_lists(task, target, draw_list, length_range, used=used, encoder=encoder, random=random)
    if drawn is None:
        return None
    lists, target_index = drawn
    meta = [META, " |"] if task.marks else [META]
    body = write_lists(
        lists,
        {(index, size): meta for index in _lists_before_a_meta(task, len(lists), target_index, random)},
        numbered=task.numbered,
    )
    return assemble(body, [question._replace(pieces=[*meta, *question.pieces]) for question in questions])


def _lists_before_a_meta(
    task: ListRecallTask | ListPointerTask, num_lists: int, target_index: int, random: KeyedRandom
) -> Sequence[int]:
    if task.meta_places.kind == "every":
        return range(num_lists)
    if task.meta_places.kind == "decoy":
        return (random.below(num_lists),)
    return (target_index,)


def solve(prompt_text: str) -> list[str]:
    """Return the answer to each question of a prompt, from the text alone."""
    lists = read_lists(prompt_text)
    return [lists[name][int(number)] for number, name in re.findall(r"Item (\d+) of (\w+) is", prompt_text)]


def read_lists(prompt_text: str) -> dict[str, dict[int, str]]:
    """Return the items of every list in a text, by name and number; items without numbers are counted."""
    lists: dict[str, dict[int, str]] = {}
    for name, content in re.findall(r"List (\w+): ([^.]*)\.", prompt_text):
        entries = [entry.split() for entry in content.split(",")]
        lists[name] = {
            int(entry[0]) if len(entry) == 2 else place: entry[-1] for place, entry in enumerate(entries, start=1)
        }
    return lists


def chance(task: ListRecallTask, instance: Instance) -> float:
    """Return the share of right answers of naming any item of the prompt."""
    del task
    return 1 / len(items_of(instance))


def _word_question(number: int, name: str) -> list[str]:
    return [" Item", f" {number}", " of", f" {name}", " is"]
