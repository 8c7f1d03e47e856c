"""The tasks by name, and the one way to an instance.

Instance i is a pure function of (task, difficulty, tokenizer, seed, split, i): no rank, worker, batch or resume
changes it. A draw that misses the wanted length or falls on the other split is dropped, and the next attempt has a key
with its own number. The places of meta-tokens, the marks and the loss are not part of the key, so arms that differ in
these see the same texts.
"""

from __future__ import annotations

import difflib
import hashlib
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from metatokens.config import tasks as config
from metatokens.data.keyed_random import KeyedRandom, hash_key
from metatokens.errors import UsageError
from metatokens.tasks import copying, list_pointer, list_recall, parity, segment_counting
from metatokens.tasks.base import Chance, Generate, Instance, LengthRange, PieceEncoder, Solve, Split

if TYPE_CHECKING:
    from metatokens.config.tasks import Difficulty, Task

# one draw in ten is of the test split, so 400 fitting draws are all of the other one once in 10^18
_MOST_FITTING = 400
# draws for each one that fits: they rarely hit a narrow range of lengths
_MOST_MISSES = 1_000


class TaskParts(NamedTuple):
    """What a task consists of."""

    config: type[Task]
    """The class of its configuration."""
    generate: Generate
    """Draws instances."""
    solve: Solve
    """Answers a prompt from its text alone."""
    chance: Chance
    """The accuracy of guessing, which charts and tables show beside a model's."""


TASKS = MappingProxyType(
    {
        "list_recall": TaskParts(config.ListRecallTask, list_recall.generate, list_recall.solve, list_recall.chance),
        "segment_counting": TaskParts(
            config.SegmentCountingTask, segment_counting.generate, segment_counting.solve, segment_counting.chance
        ),
        "parity": TaskParts(config.ParityTask, parity.generate, parity.solve, parity.chance),
        "copying": TaskParts(config.CopyingTask, copying.generate, copying.solve, copying.chance),
        "list_pointer": TaskParts(
            config.ListPointerTask, list_pointer.generate, list_pointer.solve, list_pointer.chance
        ),
    }
)


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(TASKS)


def find_task(name: str) -> TaskParts:
    """Return a task by its name.

    Raises:
        ValueError: There is none of this name; the message has the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"task must be one of {', '.join(TASKS)}, not {name!r}{hint}")


def make_instance(
    task: Task, difficulty: Difficulty, *, encoder: PieceEncoder, seed: int, split: Split, index: int
) -> Instance:
    """Return instance `index` of a split.

    Args:
        task: The task with its settings.
        difficulty: Its size, and the length of the prompt in text tokens.
        encoder: Measures the prompt; `PieceEncoder(TextEncoder(tokenizer))`.
        seed: Part of the key of the draws.
        split: Which side; the two sides share no body, for any seeds and settings.
        index: The instance, any integer from 0 on.

    Raises:
        UsageError: No prompt of this task and size has such a length, or none of those that do is of this split.
    """
    generate = TASKS[task.kind].generate
    # raises for a size that the task cannot have, even where this instance would draw another one
    _shortest_prompt(task, difficulty.size, encoder)
    length_range = LengthRange(*difficulty.prompt_tokens)
    stream = _stream_key(task, difficulty, seed, split)
    num_fitting = 0
    for attempt in range(_MOST_MISSES * _MOST_FITTING):
        key = int(hash_key(stream, index, attempt)[0])
        random = KeyedRandom(key)
        instance = generate(task, random.between(*difficulty.size), length_range, encoder=encoder, random=random)
        if instance is not None and instance.split == split:
            return instance._replace(key=key)
        num_fitting += instance is not None
        if num_fitting >= _MOST_FITTING:
            raise UsageError(
                f"{task.kind}, size {_dash(difficulty.size)}, {_dash(difficulty.prompt_tokens)} tokens",
                expected=f"prompts of the split {split}",
                found=f"none among {num_fitting} draws",
                remedy="widen difficulty.size or difficulty.prompt_tokens: there are too few prompts to divide",
            )
        if attempt >= _MOST_MISSES * (num_fitting + 1):
            break
    raise _unreachable(task, difficulty, encoder)


@lru_cache(maxsize=256)
def _stream_key(task: Task, difficulty: Difficulty, seed: int, split: Split) -> int:
    """Return the key of all instances of one kind; the same for tasks with equal texts."""
    text = (
        task.model_dump_json(exclude={"meta_places", "marks", "loss", "coupling"}, exclude_none=True)
        + difficulty.model_dump_json()
    )
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return int(hash_key(seed, digest, split == "test")[0])


@lru_cache(maxsize=256)
def _shortest_prompt(task: Task, size: tuple[int, int], encoder: PieceEncoder) -> int:
    """Return the length of a short prompt; raise the errors that instances of either bound of the size raise."""
    lengths = []
    for bound in size:
        for attempt in range(8):
            length_range = LengthRange(1, 1 << 62, "lowest")
            instance = TASKS[task.kind].generate(
                task, bound, length_range, encoder=encoder, random=KeyedRandom(attempt)
            )
            assert instance is not None, "every prompt fits this range"
            lengths.append(prompt_length(instance, encoder))
    return min(lengths)


def chance_of(instance: Instance, task: Task) -> float:
    """Return the accuracy of guessing an answer of an instance; see `Chance`."""
    return TASKS[task.kind].chance(task, instance)


def prompt_length(instance: Instance, encoder: PieceEncoder) -> int:
    """Return the number of text tokens before the last answer."""
    return encoder.count(instance.pieces[: instance.answer_pieces[-1][0]])


def _unreachable(task: Task, difficulty: Difficulty, encoder: PieceEncoder) -> UsageError:
    shortest = _shortest_prompt(task, difficulty.size, encoder)
    limit = 4 * max(shortest, difficulty.prompt_tokens[1])
    longest = shortest
    for attempt in range(8):
        length_range = LengthRange(1, limit, "highest")
        random = KeyedRandom(attempt)
        instance = TASKS[task.kind].generate(task, difficulty.size[1], length_range, encoder=encoder, random=random)
        longest = max(longest, limit if instance is None else prompt_length(instance, encoder))
    names = [name for name, bounds in config.LENGTH_BINS.items() if bounds == difficulty.prompt_tokens]
    wanted = " ".join([*names, f"({_dash(difficulty.prompt_tokens)} tokens)"])
    reach = f"about {shortest} to {longest}" if 2 * longest < limit else f"about {shortest} or more"
    return UsageError(
        f"{task.kind}, size {_dash(difficulty.size)}",
        expected=f"prompts of the bin {wanted}",
        found=f"{reach} within reach",
        remedy="change difficulty.size or the task's numbers, or pick another bin",
    )


def _dash(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1]}"
