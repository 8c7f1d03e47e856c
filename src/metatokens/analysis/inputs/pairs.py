"""Minimal pairs of the recall tasks: two prompts that differ in one item, and therefore in their answer.

The tasks draw the clean instance; the corrupt one is the same instance with one piece of its body replaced, and the
task's solver, which reads the text alone, answers both. So their tokens have equal length, their meta-tokens stand at
the same positions, and up to the answer nothing differs but the item:

    clean    List child : 1 corn , 2 jar . _ List student : 1 canoe , 2 feather . _ Item 1 of child is     -> corn
    corrupt  List child : 1 lamp , 2 jar . _ List student : 1 canoe , 2 feather . _ Item 1 of child is     -> lamp

A row ends before the first token of the answers that differs; what both answers share stands in the row. Words of
several tokens, copied spans and several questions are thus handled alike. What is replaced:

    list_recall, list_pointer  the item asked for, by another word; neither stands elsewhere in the body
    copying                    a word of a span, likewise
    segment_counting           a word of the segment, by another of the prompt's words: answers differ by one
    parity                     a bit before the last mark, by the other

Pair i is a pure function of (task, difficulty, tokenizer, seed, i), and both of its instances are of the test split.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.config.tasks import MarkedTask
from metatokens.data.injection import IntArray
from metatokens.data.keyed_random import KeyedRandom, Purpose, hash_key
from metatokens.errors import UsageError
from metatokens.tasks.base import META, PieceEncoder
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import TASKS, make_instance
from metatokens.tasks.words import ITEMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from metatokens.config.tasks import Difficulty, Task
    from metatokens.tasks.base import Instance, Solve

_MOST_ATTEMPTS = 400
_ATTEMPT_STRIDE = 2**40  # between the instances that one pair may try: no two pairs share one
_ITEM_PIECES = tuple(f" {item}" for item in ITEMS)
_BITS = (" 0", " 1")


class MinimalPair(NamedTuple):
    """Two prompts as tokens that differ in one item."""

    clean: IntArray
    """(T,), text and meta-tokens up to the token that tells answer from foil."""
    corrupt: IntArray
    """(T,)."""
    answer: int
    """The token that follows `clean`; the foil follows `corrupt`."""
    foil: int
    item_positions: IntArray
    """(n,), rising: the tokens of the item."""
    meta_positions: IntArray
    """(M,), rising; the same in both."""
    question_start: int
    """Position of the first text token behind the body."""

    @property
    def later_meta_positions(self) -> IntArray:
        """The meta-tokens behind the item, which alone can hold it."""
        later: IntArray = self.meta_positions[self.meta_positions > self.item_positions[-1]]
        return later


def make_minimal_pair(
    task: Task,
    difficulty: Difficulty,
    *,
    encoder: PieceEncoder,
    meta_token_id: int,
    seed: int,
    index: int,
) -> MinimalPair:
    """Return minimal pair `index`.

    Args:
        task: What is asked, and where meta-tokens stand.
        difficulty: How large the instances are.
        encoder: Of the model's tokenizer.
        meta_token_id: The id of the meta-token.
        seed: Of the instances, as for `make_instance`.
        index: Number of the pair.

    Raises:
        UsageError: No pair is found for the task or the tokenizer.
    """
    if isinstance(task, MarkedTask) and not task.marks:
        raise UsageError(
            f"minimal pairs of {task.kind}",
            expected="a text that tells the answer",
            found="marks false",
            remedy="set task.marks true",
        )
    for attempt in range(_MOST_ATTEMPTS):
        number = index + attempt * _ATTEMPT_STRIDE
        clean = make_instance(task, difficulty, encoder=encoder, seed=seed, split="test", index=number)
        draws = KeyedRandom(int(hash_key(seed, number, Purpose.PAIR_ITEM)[0]))
        for place, corrupt in _twins(task.kind, clean, encoder, draws):
            if corrupt.split == clean.split:
                pair = _encode(clean, corrupt, place, task=task, encoder=encoder, meta_token_id=meta_token_id)
                if pair is not None:
                    return pair
    raise UsageError(
        f"minimal pairs of {task.kind}",
        expected="an instance that changes its answer with one of its items",
        found=f"none among {_MOST_ATTEMPTS}",
        remedy="raise difficulty.size, or num_items for segment_counting, or take a tokenizer with longer words",
    )


def make_minimal_pairs(
    task: Task,
    difficulty: Difficulty,
    *,
    encoder: PieceEncoder,
    meta_token_id: int,
    seed: int,
    pairs: int,
) -> list[MinimalPair]:
    """Return the first `pairs` minimal pairs of the test split."""
    return [
        make_minimal_pair(task, difficulty, encoder=encoder, meta_token_id=meta_token_id, seed=seed, index=index)
        for index in range(pairs)
    ]


def replace_item(instance: Instance, place: int, piece: str, solve: Solve) -> Instance | None:
    """Return an instance with one piece of its body replaced and the answers that the solver gives.

    The choices are left out. None where an answer would have another number of pieces.
    """
    pieces = list(instance.pieces)
    pieces[place] = piece
    for (start, stop), answer in zip(
        instance.answer_pieces, solve(instance._replace(pieces=tuple(pieces)).prompt_text), strict=True
    ):
        words = [f" {word}" for word in answer.split()]
        if len(words) != stop - start:
            return None
        pieces[start:stop] = words
    return instance._replace(pieces=tuple(pieces), choices=())


def _twins(kind: str, clean: Instance, encoder: PieceEncoder, draws: KeyedRandom) -> Iterator[tuple[int, Instance]]:
    """Yield, in a random order, the place of an item and the instance with another item there and other answers."""
    solve = TASKS[kind].solve
    assert tuple(solve(clean.prompt_text)) == clean.answers, "the solver and the generator disagree"
    body = clean.pieces[: clean.body_stop]
    changes = _CHANGES[kind]
    for place in draws.shuffle(changes.places(body, clean.answers)):
        length = encoder.count((body[place],))
        for piece in draws.shuffle(changes.words(body, place)):
            if piece == body[place] or encoder.count((piece,)) != length:
                continue
            corrupt = replace_item(clean, place, piece, solve)
            if corrupt is not None and corrupt.answers != clean.answers:
                yield place, corrupt


def _encode(
    clean: Instance, corrupt: Instance, place: int, *, task: Task, encoder: PieceEncoder, meta_token_id: int
) -> MinimalPair | None:
    """Return the tokens of a pair; None where their lengths or meta-tokens differ or one row would be the other's."""
    ids, other = (
        encode_instance(row, task, encoder=encoder, meta_token_id=meta_token_id).input_ids for row in (clean, corrupt)
    )
    is_meta = ids == meta_token_id
    if len(ids) != len(other) or not np.array_equal(is_meta, other == meta_token_id):
        return None
    text_positions = np.flatnonzero(~is_meta)
    first = encoder.count(clean.pieces[:place])
    item_positions = text_positions[first : first + encoder.count((clean.pieces[place],))]
    differs = np.flatnonzero(ids != other)
    behind = differs[differs > item_positions[-1]]
    if not len(behind):
        return None
    end = int(behind[0])
    return MinimalPair(
        clean=ids[:end],
        corrupt=other[:end],
        answer=int(ids[end]),
        foil=int(other[end]),
        item_positions=item_positions,
        meta_positions=np.flatnonzero(is_meta[:end]),
        question_start=int(text_positions[encoder.count(clean.pieces[: clean.body_stop])]),
    )


class _Changes(NamedTuple):
    """Which pieces of a body may be replaced, and by what."""

    places: Callable[[Sequence[str], Sequence[str]], list[int]]
    """Maps the body and the answers to indices in the body."""
    words: Callable[[Sequence[str], int], Sequence[str]]
    """Maps the body and one of the places to the pieces that may stand there."""


def _asked_items(body: Sequence[str], answers: Sequence[str]) -> list[int]:
    wanted = {f" {answer}" for answer in answers}
    return [place for place, piece in enumerate(body) if piece in wanted and body.count(piece) == 1]


def _copied_words(body: Sequence[str], answers: Sequence[str]) -> list[int]:
    del answers
    return [place for place in _between(body, " [", " ]") if body.count(body[place]) == 1]


def _counted_words(body: Sequence[str], answers: Sequence[str]) -> list[int]:
    del answers
    return [place for place in _between(body, " [", " ]") if body[place] in _ITEM_PIECES]


def _summed_bits(body: Sequence[str], answers: Sequence[str]) -> list[int]:
    del answers
    last_mark = max(place for place, piece in enumerate(body) if piece == " |")
    return [place for place in range(last_mark) if body[place] in _BITS]


def _between(body: Sequence[str], opening: str, closing: str) -> list[int]:
    """Return the places of what stands between two marks, the meta-tokens aside."""
    inside, places = False, []
    for place, piece in enumerate(body):
        if piece in (opening, closing):
            inside = piece == opening
        elif inside and piece != META:
            places.append(place)
    return places


def _absent_items(body: Sequence[str], place: int) -> list[str]:
    del place
    present = set(body)
    return [piece for piece in _ITEM_PIECES if piece not in present]


def _present_items(body: Sequence[str], place: int) -> list[str]:
    del place
    present = set(body)
    return [piece for piece in _ITEM_PIECES if piece in present]


_CHANGES = MappingProxyType(
    {
        "list_recall": _Changes(_asked_items, _absent_items),
        "list_pointer": _Changes(_asked_items, _absent_items),
        "copying": _Changes(_copied_words, _absent_items),
        "segment_counting": _Changes(_counted_words, _present_items),
        "parity": _Changes(_summed_bits, lambda body, place: _BITS),  # noqa: ARG005 - any bit may stand anywhere
    }
)


@shared
def pairs_of(inputs: Inputs) -> list[MinimalPair]:
    """Return the minimal pairs of the analysed task that have a meta-token behind the item.

    Raises:
        UsageError: There is none.
    """
    pairs = make_minimal_pairs(
        inputs.task.task,
        inputs.task.difficulty,
        encoder=PieceEncoder(inputs.encoder),
        meta_token_id=inputs.meta_token_id,
        seed=inputs.config.seed,
        pairs=inputs.task.pairs,
    )
    usable = [pair for pair in pairs if len(pair.later_meta_positions)]
    if not usable:
        raise UsageError(
            "minimal pairs",
            expected="a meta-token behind the item",
            found=f"none in {len(pairs)} pairs",
            remedy="choose a task that places meta-tokens",
        )
    if len(usable) < len(pairs):
        inputs.skip(f"causal: {len(pairs) - len(usable)} pairs have no meta-token behind the item")
    return usable
