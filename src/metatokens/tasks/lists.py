"""Named lists, as in `List castle: 1 river, 2 stone.`, which three of the tasks are made of.

The number of lists is what makes a prompt longer; all lists of a prompt have the same number of items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from metatokens.errors import UsageError
from metatokens.tasks.base import fill_prompt
from metatokens.tasks.words import ITEMS, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from metatokens.config.tasks import ListPointerTask, ListRecallTask, SegmentCountingTask
    from metatokens.tasks.base import Draws, PieceEncoder, Room


class NamedList(NamedTuple):
    """A list of the prompt."""

    name: str
    items: list[str]

    def pieces(self, *, numbered: bool) -> list[str]:
        """Return the list as text: its name, its items with their numbers, a full stop."""
        return [*self.opening(), *(piece for item in self.item_pieces(numbered=numbered) for piece in item)]

    def opening(self) -> list[str]:
        """Return the pieces before the first item."""
        return [" List", f" {self.name}", ":"]

    def item_pieces(self, *, numbered: bool) -> list[list[str]]:
        """Return the pieces of each item, with the comma or the full stop behind it."""
        last = len(self.items)
        return [
            [*([f" {number}"] if numbered else []), f" {item}", "," if number < last else "."]
            for number, item in enumerate(self.items, start=1)
        ]


def draw_items(count: int, draws: Draws, *, key: str) -> list[str]:
    """Return different items in a random order.

    Raises:
        UsageError: There are not as many; the message names the key of the setting.
    """
    if count > len(ITEMS):
        raise UsageError(key, expected=f"at most {len(ITEMS)} different items", found=str(count), remedy="lower it")
    order = draws.shuffle(ITEMS)
    return [next(order) for _ in range(count)]


def draw_names(task: ListRecallTask | ListPointerTask | SegmentCountingTask, draws: Draws) -> Iterator[str]:
    """Return the names of the lists in a random order, each once.

    Raises:
        UsageError: The task may need more of them than there are.
    """
    if task.num_lists[1] > len(NAMES):
        raise UsageError(
            f"{task.kind}.num_lists",
            expected=f"at most {len(NAMES)}, the number of names",
            found=str(task.num_lists[1]),
            remedy="lower it and raise difficulty.size",
        )
    return draws.shuffle(NAMES)


def draw_body(
    task: ListRecallTask | ListPointerTask | SegmentCountingTask,
    target: Sequence[str],
    draw_list: Callable[[], NamedList],
    room: Room,
    *,
    used: int,
    encoder: PieceEncoder,
    draws: Draws,
) -> list[str] | None:
    """Draw the other lists and return the body of the prompt, the target list at a random place among them.

    Args:
        task: For the number of lists and their form.
        target: The pieces of the list that is asked about, with its meta-tokens and marks.
        draw_list: Draws another list.
        room: The bounds of the whole prompt.
        used: Text tokens of the questions.
        encoder: Measures the lists.
        draws: For the length and the place.
    """
    fewest, most = task.num_lists
    # the first list opens the text: there is no space before it
    first_word = encoder.count(("List",)) - encoder.count((" List",))
    others = fill_prompt(
        room,
        used + encoder.count(target) + first_word,
        lambda: draw_list().pieces(numbered=task.numbered),
        encoder=encoder,
        draws=draws,
        num_parts=(fewest - 1, most - 1),
    )
    if others is None:
        return None
    place = draws.below(len(others) + 1)
    body = [piece for pieces in (*others[:place], target, *others[place:]) for piece in pieces]
    return ["List", *body[1:]]
