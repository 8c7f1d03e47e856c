"""List pointer (paper section 3): point to item j of a named list, among the items of the prompt.

The lists, the meta-tokens and the answer are those of list recall; the question is worded as a pointer, and an
answer is scored as a single choice over `Instance.choices`: every item of the prompt once, in the order in which
they first occur. The paper does not give the wording of its pointer question; this one is ours.

Input, and targets for the two kinds of loss:

    input  List   reader :   net ,   saw . _    List    captain :   mud ,    pony . _     Point to   item
    answer -      -      -   -   -   -   - -    -       -       -   -   -    -    - -     -     -    -
    full   reader :      net ,   saw .   - List captain :       mud ,   pony .    - Point to    item 2

    input  2  of     reader :   saw
    answer -  -      -      saw -
    full   of reader :      saw -

The choices here are net, saw, mud, pony.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from metatokens.tasks.list_recall import generate_recall, read_lists
from metatokens.tasks.lists import items_of

if TYPE_CHECKING:
    from metatokens.config.tasks import ListPointerTask
    from metatokens.data.keyed_random import KeyedRandom
    from metatokens.tasks.base import Instance, LengthRange, PieceEncoder


def generate(
    task: ListPointerTask, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
) -> Instance | None:
    """Draw lists of `size` items, the questions and their choices; None if the prompt misses the range."""
    instance = generate_recall(task, size, length_range, word_question=_word_question, encoder=encoder, random=random)
    return None if instance is None else instance._replace(choices=items_of(instance))


def solve(prompt_text: str) -> list[str]:
    """Return the answer to each question of a prompt, from the text alone."""
    lists = read_lists(prompt_text)
    return [lists[name][int(number)] for number, name in re.findall(r"Point to item (\d+) of (\w+):", prompt_text)]


def chance(task: ListPointerTask, instance: Instance) -> float:
    """Return the share of right answers of any choice: one of the items of the prompt."""
    del task
    return 1 / len(items_of(instance))


def _word_question(number: int, name: str) -> list[str]:
    return [" Point", " to", " item", f" {number}", " of", f" {name}", ":"]
