"""Named lists, as in `List castle: 1 river, 2 stone.`, which make up the prompts of three tasks.

A longer prompt has more lists; all lists of a prompt have the same number of items.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from metatokens.errors import UsageError
from metatokens.tasks.base import fill_prompt, interleave
from metatokens.tasks.words import ITEMS, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from metatokens.config.tasks import ListPointerTask, ListRecallTask, SegmentCountingTask
    from metatokens.data.keyed_random import KeyedRandom
    from metatokens.tasks.base import Instance, LengthRange, PieceEncoder


_ITEM_PIECES = frozenset(f" {item}" for item in ITEMS)


class NamedList(NamedTuple):
    """A list of the prompt."""

    name: str
    items: list[str]

    def pieces(self, inserted: Mapping[int, list[str]] = MappingProxyType({}), *, numbered: bool) -> list[str]:
        """Return the list as text: its name, its items with their numbers, a full stop.

        Args:
            inserted: Pieces to put before item `index` (from 0), or after the full stop.
            numbered: Write its number before each item.
        """
        last = len(self.items)
        items = [
            [*([f" {number}"] if numbered else []), f" {item}", "," if number < last else "."]
            for number, item in enumerate(self.items, start=1)
        ]
        return [" List", f" {self.name}", ":", *interleave(items, inserted)]


def items_of(instance: Instance) -> tuple[str, ...]:
    """Return the pieces of the different items of a prompt, in the order in which they first occur."""
    body = instance.pieces[: instance.body_stop]
    return tuple(dict.fromkeys(piece for piece in body if piece in _ITEM_PIECES))


def draw_items(count: int, random: KeyedRandom, *, key: str) -> list[str]:
    """Return different items in a random order.

    Raises:
        UsageError: There are fewer items than `count`; the message names `key`, the key of the setting.
    """
    if count > len(ITEMS):
        raise UsageError(key, expected=f"at most {len(ITEMS)} different items", found=str(count), remedy="lower it")
    order = random.shuffle(ITEMS)
    return [next(order) for _ in range(count)]


def draw_names(task: ListRecallTask | ListPointerTask | SegmentCountingTask, random: KeyedRandom) -> Iterator[str]:
    """Return the names of the lists in a random order, each once.

    Raises:
        UsageError: The task may need more names than there are.
    """
    if task.num_lists[1] > len(NAMES):
        raise UsageError(
            f"{task.kind}.num_lists",
            expected=f"at most {len(NAMES)}, the number of names",
            found=str(task.num_lists[1]),
            remedy="lower it and raise difficulty.size",
        )
    return random.shuffle(NAMES)


def draw_other_lists(
    task: ListRecallTask | ListPointerTask | SegmentCountingTask,
    target: NamedList,
    draw_list: Callable[[], NamedList],
    length_range: LengthRange,
    *,
    used: int,
    encoder: PieceEncoder,
    random: KeyedRandom,
) -> tuple[list[NamedList], int] | None:
    """Draw the other lists, and return all lists with the index of the target, which may be any.

    Args:
        task: Gives the number of lists and their form.
        target: The list of the questions.
        draw_list: Draws another list.
        length_range: The bounds of the whole prompt.
        used: Text tokens of the questions and the marks.
        encoder: Measures the lists.
        random: Draws the length and the target's place.
    """
    fewest, most = task.num_lists
    drawn: list[NamedList] = []

    def draw_part() -> list[str]:
        drawn.append(draw_list())
        return drawn[-1].pieces(numbered=task.numbered)

    # the first list opens the text: there is no space before it
    first_word = encoder.count(("List",)) - encoder.count((" List",))
    parts = fill_prompt(
        length_range,
        used + encoder.count(target.pieces(numbered=task.numbered)) + first_word,
        draw_part,
        encoder=encoder,
        random=random,
        num_parts=(fewest - 1, most - 1),
    )
    if parts is None:
        return None
    place = random.below(len(parts) + 1)
    return [*drawn[:place], target, *drawn[place : len(parts)]], place


def write_lists(lists: list[NamedList], inserted: Mapping[tuple[int, int], list[str]], *, numbered: bool) -> list[str]:
    """Return the body of a prompt, with pieces inserted at (list, item) as `NamedList.pieces` has it."""
    body = []
    for index, named in enumerate(lists):
        own = {item: pieces for (place, item), pieces in inserted.items() if place == index}
        body += named.pieces(own, numbered=numbered)
    return ["List", *body[1:]]
