"""What tasks are made of: filler sentences, books and bAbI stories, read from paths that the user names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from metatokens.data.keyed_random import KeyedRandom
from metatokens.data.source_files import unpacked_chunks
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.errors import DataError, UsageError

# Hsieh et al. 2024 (RULER) and Mohtashami and Jaggi 2023, section 4.2
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
MOST_FACTS = 30
"""Longer bAbI stories are left out: they would leave no room for books at short lengths."""
_WORDS_OF_A_SENTENCE = range(4, 61)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_FIELDS = re.compile(r"[\t|]")  # tabs, as bAbI says; some copies have bars
# the licence of Project Gutenberg around a book
_BODY = re.compile(r"\*\*\* ?START OF.*?\*\*\*\n(.*?)(?:\*\*\* ?END OF|\Z)", re.DOTALL)


class Book(NamedTuple):
    """A book without the licence around it."""

    name: str
    text: str


class Story(NamedTuple):
    """A question of bAbI."""

    facts: tuple[str, ...]
    """All sentences of its story before it."""
    question: str
    answer: str
    needed: int
    """The index of the last supporting fact."""


class Material:
    """Books and stories, each read when a task first asks for it."""

    def __init__(
        self,
        *,
        haystack: Literal["noise", "books"] = "noise",
        books: Path | None = None,
        babi: Path | None = None,
        max_books: int | None = None,
    ) -> None:
        """Note the paths."""
        self.haystack = haystack
        self._books = books
        self._babi = babi
        self._max_books = max_books
        self._stories: dict[int, list[Story]] = {}

    @cached_property
    def books(self) -> list[Book]:
        """The books, in the order of their names.

        Raises:
            UsageError: no path was given.
            DataError: there is no book, or none can be read.
        """
        if self._books is None:
            raise UsageError(
                "books", expected="a file or folder of books", found="none named", remedy="name one with --books"
            )
        options = SourceOptions(max_documents=self._max_books)
        books = []
        for document in iterate_documents(str(self._books), options):
            body = _BODY.search(document.text)
            books.append(Book(document.source, (body[1] if body else document.text).strip()))
        if not books:
            raise DataError(str(self._books), expected="books", found="no text", remedy="name another folder")
        return books

    def stories(self, number: int) -> list[Story]:
        """Return the questions of the test part of a bAbI task that have at most `MOST_FACTS` facts.

        Raises:
            UsageError: no folder was given.
            DataError: the folder has no such task, or its file is none of bAbI.
        """
        if number not in self._stories:
            if self._babi is None:
                raise UsageError(
                    "babi", expected="a folder of the bAbI tasks", found="none named", remedy="name one with --babi"
                )
            self._stories[number] = _read_stories(self._babi, number)
        return self._stories[number]

    def filler(self, draw: KeyedRandom, *, from_books: bool) -> Filler:
        """Return an endless run of sentences; of books it begins at a sentence that is drawn."""
        if not from_books:
            return Filler(NOISE, 0)
        book = draw.below(len(self.books))
        sentences = self._sentences(book)
        return Filler(sentences, draw.below(len(sentences)))

    @lru_cache(maxsize=32)  # noqa: B019 - the material of a run lives as long as the run
    def _sentences(self, book: int) -> tuple[str, ...]:
        sentences = tuple(sentences_of(self.books[book].text))
        if not sentences:
            raise DataError(
                self.books[book].name,
                expected="sentences that end in . ! or ?",
                found="none",
                remedy="leave it out",
            )
        return sentences


class Filler(NamedTuple):
    """Sentences that go round."""

    sentences: tuple[str, ...]
    start: int

    def take(self, count: int) -> list[str]:
        """Return the first `count` sentences."""
        return [self.sentences[(self.start + i) % len(self.sentences)] for i in range(count)]


def sentences_of(text: str) -> Iterator[str]:
    """Yield the sentences of a text that are neither very short nor very long, each on one line."""
    for piece in _SENTENCE_END.split(text):
        words = piece.split()
        if len(words) in _WORDS_OF_A_SENTENCE:
            yield " ".join(words)


def _read_stories(folder: Path, number: int) -> list[Story]:
    found = sorted(path for path in folder.glob(f"qa{number}_*test.txt*") if path.is_file())
    if not found:
        raise DataError(
            str(folder),
            expected=f"qa{number}_..._test.txt of the bAbI tasks",
            found="no such file",
            remedy="name the folder of the tasks in English, en/ of tasks_1-20_v1-2",
        )
    path = found[0]
    packed = path.suffix if path.suffix != ".txt" else ""
    text = b"".join(unpacked_chunks(path, packed)).decode()
    stories = [story for story in parse_stories(text, path.name) if len(story.facts) <= MOST_FACTS]
    if not stories:
        raise DataError(
            str(path), expected=f"questions of at most {MOST_FACTS} facts", found="none", remedy="replace the file"
        )
    return stories


def parse_stories(text: str, name: str) -> Iterator[Story]:
    """Yield the questions of a file of bAbI, in its order.

    Raises:
        DataError: a line does not begin with a number, or a question comes before every fact.
    """
    facts: list[tuple[int, str]] = []
    for row, line in enumerate(text.splitlines(), start=1):
        number, _, rest = line.partition(" ")
        facts = [] if number == "1" else facts
        sentence, *parts = _FIELDS.split(rest)
        if not number.isdigit() or not rest or (parts and not facts):
            raise DataError(
                f"{name}, line {row}",
                expected="a number and a sentence, and facts before a question",
                found=repr(line[:80]),
                remedy="replace it",
            )
        if not parts:
            facts.append((int(number), sentence.strip()))
            continue
        question, (answer, *support) = sentence, parts
        numbers = [own for own, _ in facts]
        last = max((int(one) for one in " ".join(support).split() if int(one) in numbers), default=numbers[-1])
        yield Story(tuple(fact for _, fact in facts), question.strip(), answer.strip(), numbers.index(last))
