"""From a case to a text of a wanted length: filler around the hidden sentences, until no further sentence fits.

Item i is a pure function of (task, length, tokenizer, material, seed, i). The places of the hidden sentences are shares
of the filler, so an item has them at about the same depth at every length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from metatokens.data.keyed_random import KeyedRandom, hash_key
from metatokens.errors import UsageError
from metatokens.evaluation.long_context.cases import Case, LongContextTask
from metatokens.evaluation.long_context.material import Filler, Material

_STEPS = 1 << 32  # of a depth


class Encoder(Protocol):
    """Turns text into ids of the model."""

    def encode(self, text: str) -> list[int]:
        """Return the ids, with those that the tokenizer puts before every text."""


@dataclass(frozen=True)
class Item:
    """One text with its question and its answer."""

    prompt: str
    answer: str
    depth: float
    """Where the sentence that tells the answer stands among the filler: 0 at its start, 1 at its end."""


def make_item(
    task: LongContextTask, length: int, *, encoder: Encoder, material: Material, seed: int, index: int
) -> Item:
    """Return item `index` of a task.

    Args:
        task: the task.
        length: tokens of prompt and answer, at most; as many sentences of filler as fit.
        encoder: of the model.
        material: filler and stories.
        seed: of the draws.
        index: from 0 on.

    Raises:
        UsageError: the length has no room for the case, or its answer does not add tokens to those of the prompt.
    """
    draw = KeyedRandom(int(hash_key(seed, task.key, index)[0]))
    case = task.draw(draw, material)
    depths = sorted(draw.below(_STEPS) for _ in case.hidden)
    from_books = task.hides_in == "books" or material.haystack == "books"
    filler = material.filler(draw, from_books=from_books)

    def count(num_filler: int) -> int:
        return len(encoder.encode(_prompt(case, filler, depths, num_filler) + case.answer))

    shortest = count(0)
    if shortest > length:
        raise UsageError(
            f"{task.name} at length {length}",
            expected=f"room for at least {shortest} tokens, which this text has without filler",
            found=str(length),
            remedy="raise lengths, or leave the task out",
        )
    num_filler = _most_that_fit(count, length)
    prompt = _prompt(case, filler, depths, num_filler)
    asked, whole = encoder.encode(prompt), encoder.encode(prompt + case.answer)
    check_answer(case.answer, asked, whole, name=task.name)
    depth = depths[case.needed] / _STEPS if depths else 0.0
    return Item(prompt, case.answer, depth)


def check_answer(answer: str, asked: list[int], whole: list[int], *, name: str) -> None:
    """Compare the ids of a prompt with those of the prompt and its answer.

    Raises:
        UsageError: the answer of the task `name` does not add tokens to those of the prompt.
    """
    # a token that holds the end of the prompt too would move the targets
    if whole[: len(asked)] != asked or len(whole) == len(asked):
        raise UsageError(
            f"the answer {answer!r} of {name}",
            expected="at least one token of its own",
            found="none in this tokenizer" if whole == asked else "one that this tokenizer joins with the prompt",
            remedy="leave the task out, or use another tokenizer",
        )


def _most_that_fit(count: Callable[[int], int], length: int) -> int:
    """Return the most sentences of filler with which the text has at most `length` tokens."""
    fits, too_many = 0, 1
    while count(too_many) <= length:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if count(middle) <= length else (fits, middle)
    return fits


def _prompt(case: Case, filler: Filler, depths: list[int], num_filler: int) -> str:
    """Return the prompt; a hidden sentence stands before the filler sentence that its depth points to."""
    sentences = filler.take(num_filler)
    for hidden, depth in reversed(list(zip(case.hidden, depths, strict=True))):
        sentences.insert(depth * (num_filler + 1) // _STEPS, hidden)
    return "\n".join(part for part in (case.before, " ".join(sentences), case.after) if part)
