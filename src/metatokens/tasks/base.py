"""What the recall tasks share: an instance, the draws that make it, and how it grows to a wanted length.

An instance is a row of pieces of text. A piece is a word or a number with the space before it, or a mark of
punctuation, and GPT-2's split pattern always cuts before a word, so a text's ids are the ids of its pieces and its
length is known while it grows. A tokenizer may join marks that meet, as "]" and "."; the pieces stay apart here, in
training and evaluation alike. `META` in the row is a place that the task gives to a meta-token.

Where a question is about a marked place (the ends of a segment or a span, the end of the bits), the text carries a
visible mark there, a bracket or a bar. So a model without meta-tokens is told as much as one with them. The lists of
list recall and list pointer carry bars only on request (`marks`). Without bars the paper's places are a hint that only
a model with meta-tokens gets: the meta-token stands after the list that holds the answer. The paper's instances are not
published; these marks and the sentences are ours.

The docstring of each task draws an instance: `_` is a meta-token, `-` in the rows of targets no loss term, and a
target stands under the position that must predict it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from metatokens.data.special_tokens import META_TOKEN
from metatokens.errors import UsageError
from metatokens.tasks.words import ITEMS, NAMES, SENTENCE_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from metatokens.config.tasks import CopyingTask, ParityTask, SegmentCountingTask
    from metatokens.data.keyed_random import KeyedRandom
    from metatokens.data.tokenizer import TextEncoder

META = META_TOKEN
Split: TypeAlias = Literal["train", "test"]
_Place = TypeVar("_Place", bound=Hashable)

_TEST_BUCKETS = 10  # one in ten, paper section 3: 90k training and 10k test instances


class Instance(NamedTuple):
    """One prompt with its questions and answers."""

    pieces: tuple[str, ...]
    """Pieces of text, and META at the places of the task."""
    answer_pieces: tuple[tuple[int, int], ...]
    """(start, stop) of each answer in `pieces`; the last one ends the instance."""
    body_stop: int
    """Index in `pieces` of the first question; the pieces before it are the body."""
    choices: tuple[str, ...] = ()
    """The pieces that an answer is chosen from; empty if the task has no choices."""
    key: int = 0
    """The 64-bit key of its draws; its encoding draws from it too."""

    @property
    def text(self) -> str:
        """The whole text with the answers and without meta-tokens."""
        return _join(self.pieces)

    @property
    def prompt_text(self) -> str:
        """The text without meta-tokens and answers, which is all that a solver may read."""
        prompt: list[str] = []
        start = 0
        for answer_start, answer_stop in self.answer_pieces:
            prompt += self.pieces[start:answer_start]
            start = answer_stop
        return _join(prompt)

    @property
    def answers(self) -> tuple[str, ...]:
        """The text of each answer, without the space before it."""
        return tuple(_join(self.pieces[start:stop]).strip() for start, stop in self.answer_pieces)

    @property
    def split(self) -> Split:
        """The side of the split, a function of the instance's content: the words and numbers of its body.

        Two instances of one content are on one side, whatever their questions, marks, meta-tokens, seeds and
        settings, so training and test are disjoint without a list of what was drawn.
        """
        content = "".join(piece for piece in self.pieces[: self.body_stop] if piece[-1].isalnum()).lower()
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        return "train" if int.from_bytes(digest, "little") % _TEST_BUCKETS else "test"


class LengthRange(NamedTuple):
    """The lengths that a prompt may have, in text tokens, and the one that it aims at."""

    lowest: int
    highest: int
    aim: Literal["uniform", "lowest", "highest"] = "uniform"


class Generate(Protocol):
    """The generator of a task."""

    def __call__(
        self, task: Any, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
    ) -> Instance | None:
        """Draw an instance of this size, or return None if the prompt misses the range."""


class Solve(Protocol):
    """The solver of a task: it reads the prompt text alone and shares nothing with the generator."""

    def __call__(self, prompt_text: str) -> list[str]:
        """Return the answer to each question, in order."""


class Chance(Protocol):
    """The accuracy of guessing an answer of a prompt."""

    def __call__(self, task: Any, instance: Instance) -> float:
        """Return the share of right answers of who knows the task and reads the text, but not which place is meant."""


class PieceEncoder:
    """Encoder of pieces: the ids of each are looked up once.

    Attributes:
        text_encoder: Encodes whole texts.
        vocab_size: V, the text vocabulary; V is the id of the meta-token.

    Raises:
        UsageError: The tokenizer joins text across pieces, as it does without a split at words.
    """

    text_encoder: TextEncoder
    vocab_size: int
    _probed: ClassVar[set[str]] = set()  # tokenizers that passed, since a sweep makes many encoders of one

    def __init__(self, text_encoder: TextEncoder) -> None:
        self.text_encoder = text_encoder
        self.vocab_size = text_encoder.vocab_size
        self._ids: dict[str, tuple[int, ...]] = {META: ()}
        self._seams: set[tuple[str, str]] = set()
        if text_encoder.sha256 not in self._probed:
            self._probe()
            self._probed.add(text_encoder.sha256)

    def ids(self, piece: str) -> tuple[int, ...]:
        """Return the ids of one piece; none for META."""
        ids = self._ids.get(piece)
        if ids is None:
            ids = self._ids[piece] = self._encode(piece)
        return ids

    def count(self, pieces: Iterable[str]) -> int:
        """Return the number of text tokens in pieces; META has none."""
        return sum([len(self.ids(piece)) for piece in pieces])

    def check_answer(self, before: str, answer: str) -> None:
        """Check that an answer has the same tokens after its prompt as alone.

        Args:
            before: The last piece of text before the answer.
            answer: The text of the answer, with its space.

        Raises:
            UsageError: They differ, so a model that continues the prompt could not give the answer.
        """
        if (before, answer) in self._seams:
            return
        together, apart = self._encode(before + answer), self._encode(before) + self._encode(answer)
        if together != apart:
            raise _tokenizer_error(f"the answer {answer.strip()!r} after {before.strip()!r}", together, apart)
        self._seams.add((before, answer))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.text_encoder.encode_batch([text])[0].tolist())

    def _probe(self) -> None:
        """Compare text with its pieces, on every word and every mark that the tasks use."""
        words = [f" {word}" for word in (*ITEMS, *NAMES, *SENTENCE_WORDS, *range(100))]
        titles = [f" {word.title()}" for word in SENTENCE_WORDS]
        marks = (" [", " lamb", " ]", " lamb", ",", " [", " 0", " |", " 1", ".", " ]", " List", ":", " 1", ",", " ]")
        bars = (".", " |", " List", ".", " |", " |", " Item", ".", " |", " Point")
        pieces = ("List", *words, *(piece for word in words for piece in (word, ",")), *titles, *marks, *bars, *titles)
        # marks that meet may be one token of a tokenizer: no word is lost in it, and an answer is checked on its own
        units: list[str] = []
        for is_word, run in groupby(pieces, key=lambda piece: piece[-1].isalnum()):
            run_of_pieces = list(run)
            units += run_of_pieces if is_word else ["".join(run_of_pieces)]
        apart = tuple(token for unit in units for token in self._encode(unit))
        together = self._encode("".join(units))
        if together != apart:
            seams = ((left, right) for left, right in pairwise(units) if not self._is_seam(left, right))
            left, right = next(seams, ("the words of the recall tasks", "each other"))
            raise _tokenizer_error(f"{right.strip()!r} after {left.strip()!r}", together, apart)

    def _is_seam(self, left: str, right: str) -> bool:
        return self._encode(left + right) == self._encode(left) + self._encode(right)


def fill_prompt(
    length_range: LengthRange,
    used: int,
    draw_part: Callable[[], list[str]],
    *,
    encoder: PieceEncoder,
    random: KeyedRandom,
    num_parts: tuple[int, int],
) -> list[list[str]] | None:
    """Draw parts until the prompt reaches its goal, by default a length drawn uniformly from the possible ones.

    Args:
        length_range: The bounds of the whole prompt.
        used: Text tokens that the prompt has without the parts.
        draw_part: Draws the pieces of one more part.
        encoder: Measures them.
        random: Draws the length.
        num_parts: Inclusive bounds of the number of parts.

    Returns:
        The parts, or None if the prompt misses the range.
    """
    fewest, most = num_parts
    parts = [draw_part() for _ in range(fewest)]
    length = used + sum(encoder.count(part) for part in parts)
    if length > length_range.highest:
        return None
    lowest = max(length, length_range.lowest)
    if length_range.aim == "uniform":
        goal = random.between(lowest, length_range.highest)
    else:
        goal = lowest if length_range.aim == "lowest" else length_range.highest
    while length < goal and len(parts) < most:
        part = draw_part()
        part_length = encoder.count(part)
        if length + part_length > length_range.highest:
            break
        parts.append(part)
        length += part_length
    return parts if length >= length_range.lowest else None


def interleave(parts: Sequence[Sequence[str]], inserted: Mapping[int, Sequence[str]]) -> list[str]:
    """Return the pieces of all parts, with `inserted[index]` before part `index`, or after the last one."""
    pieces: list[str] = []
    for index in range(len(parts) + 1):
        pieces += inserted.get(index, ())
        pieces += parts[index] if index < len(parts) else ()
    return pieces


def mark_places(
    task: SegmentCountingTask | ParityTask | CopyingTask,
    marked: Iterable[tuple[_Place, str]],
    decoys: Iterable[_Place] | None,
) -> dict[_Place, list[str]]:
    """Return what to insert at each place of a body.

    Args:
        task: For `marks`.
        marked: The places that the question is about, each with its mark, in the order of the text.
        decoys: Other places for the meta-tokens; None puts one right before each mark.
    """
    inserted: dict[_Place, list[str]] = defaultdict(list)
    num_marks = 2 if task.marks == "double" else int(task.marks)
    for place in decoys or ():
        inserted[place].append(META)
    for place, mark in marked:
        inserted[place] += [*([META] if decoys is None else []), *[mark] * num_marks]
    return inserted


class Question(NamedTuple):
    """A question as it stands in the text, and its answer."""

    pieces: list[str]
    answer: list[str]


def count_question_tokens(questions: Sequence[Question], encoder: PieceEncoder) -> int:
    """Return the number of text tokens of the questions and their answers, without the last answer."""
    pieces = assemble([], questions).pieces
    return encoder.count(pieces[: len(pieces) - len(questions[-1].answer)])


def assemble(body: list[str], questions: Sequence[Question], choices: tuple[str, ...] = ()) -> Instance:
    """Put the questions after the body, each with its answer, and a full stop between them."""
    pieces = list(body)
    answer_pieces = []
    for number, question in enumerate(questions):
        if number:
            pieces.append(".")
        pieces += question.pieces
        answer_pieces.append((len(pieces), len(pieces) + len(question.answer)))
        pieces += question.answer
    return Instance(tuple(pieces), tuple(answer_pieces), len(body), choices)


def _tokenizer_error(where: str, together: tuple[int, ...], apart: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"tokenizer: {where}",
        expected=f"the same {len(apart)} tokens as piece by piece",
        found=f"{len(together)} other tokens",
        remedy="use a tokenizer that splits text at words and punctuation, as GPT-2's does",
    )


def _join(pieces: Iterable[str]) -> str:
    return "".join([piece for piece in pieces if piece != META])
