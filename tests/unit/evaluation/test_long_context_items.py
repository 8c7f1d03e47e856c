"""The texts of the long-context suite: pure functions of seed and number, as long as asked, and answerable."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from long_texts import STORY, byte_tokenizer, decoder, write_books, write_stories
from metatokens.errors import DataError, UsageError
from metatokens.evaluation.long_context.items import Item, make_item
from metatokens.evaluation.long_context.material import NOISE, Material, parse_stories
from metatokens.evaluation.long_context.subject import Subject
from metatokens.evaluation.long_context.tasks import TASKS

LENGTH = 1500


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    return Material(books=write_books(folder / "books"), babi=write_stories(folder / "babi"))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(decoder(), byte_tokenizer())


# what the prompt alone says: one solver for each task -----------------------------------------------------------


def number_of_key(prompt: str) -> str:
    key = re.search(r"The special magic number for (\S+) mentioned in the text is$", prompt)[1]
    (number,) = re.findall(rf"magic numbers for {key} is: (\d{{7}})\.", prompt)
    return number


def numbers_of_key(prompt: str) -> str:
    numbers = re.findall(r"One of the special magic numbers for \S+ is: (\d{7})\.", prompt)
    assert len(numbers) == 4
    return ", ".join(numbers)


def chain(prompt: str) -> str:
    value = re.search(r"value (\d+) in the text", prompt)[1]
    names = re.findall(rf"VAR (\w+) = {value}\.", prompt)
    while following := re.findall(rf"VAR (\w+) = VAR {names[-1]}\.", prompt):
        names += following
    return ", ".join(names)


def place(prompt: str) -> str:
    person = re.search(r"Question: Where is (\w+)\?\nAnswer:$", prompt)[1]
    found = re.findall(rf"{person} (?:moved|went) to the (\w+)\.", prompt)
    return found[0] if found else "office"


SOLVERS: dict[str, Callable[[str], str]] = {
    "needle": number_of_key,
    "multi-key": number_of_key,
    "multi-value": numbers_of_key,
    "variables": chain,
    "passkey": lambda prompt: re.search(r"The pass key is (\d{5})\. Remember", prompt)[1],
    "copying": lambda prompt: re.search(r"^Line of words: (.*)\.\n", prompt)[1],
    **{f"babilong-qa{number}": place for number in range(1, 6)},
}


def test_every_task_has_its_solver_here() -> None:
    assert SOLVERS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", SOLVERS)
def test_the_answer_follows_from_the_prompt_which_is_as_long_as_asked(
    name: str, subject: Subject, material: Material
) -> None:
    items = []
    for index in range(6):
        item = make_item(TASKS[name], LENGTH, encoder=subject, material=material, seed=3, index=index)
        assert item.answer == " " + SOLVERS[name](item.prompt)
        # one more sentence of filler, of at most 60 bytes, would be too long
        assert LENGTH - 60 < len(subject.encode(item.prompt + item.answer)) <= LENGTH
        assert 0 <= item.depth < 1
        items.append(item)
    assert len({item.prompt for item in items}) > 3
    again = make_item(TASKS[name], LENGTH, encoder=subject, material=material, seed=3, index=5)
    other = make_item(TASKS[name], LENGTH, encoder=subject, material=material, seed=4, index=5)
    assert again == items[5] != other


def test_an_item_has_its_sentences_at_about_the_same_depth_at_every_length(
    subject: Subject, material: Material
) -> None:
    def place_of(item: Item) -> float:
        before, after = item.prompt.split("One of the special")
        return before.count("Here we go") / (before.count("Here we go") + after.count("Here we go"))

    for index in range(4):
        short, long = (
            make_item(TASKS["needle"], length, encoder=subject, material=material, seed=0, index=index)
            for length in (1200, 6000)
        )
        assert short.answer == long.answer
        assert short.depth == long.depth == pytest.approx(place_of(long), abs=0.05)
        assert place_of(short) == pytest.approx(place_of(long), abs=0.2)


def test_books_are_the_haystack_where_asked_without_their_licence(subject: Subject, material: Material) -> None:
    in_books = Material(haystack="books", books=material._books)
    item = make_item(TASKS["passkey"], LENGTH, encoder=subject, material=in_books, seed=0, index=0)
    assert "says nothing of use." in item.prompt
    assert not any(sentence in item.prompt for sentence in NOISE)
    assert all(book.text.startswith("In book") and book.text.endswith("of use.") for book in in_books.books)


def test_stories_of_babi_are_cut_at_their_questions() -> None:
    first, second, third = parse_stories(STORY, "qa1")
    assert first.facts == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (first.question, first.answer, first.needed) == ("Where is Mary?", "bathroom", 0)
    assert second.facts == (*first.facts, "Daniel went back to the garden.")
    assert second.needed == 1
    assert third == (("Sandra took the football there.",), "Where is Sandra?", "office", 0)


def without_digits() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isdigit()]
    vocabulary = {"<|endoftext|>": 0, "\u2581": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def merging_over_the_seam() -> Tokenizer:
    ends = "abcdefghijklmnopqrstuvwxyz?:."
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<|endoftext|>": 95}
    vocabulary |= {f"{end} ": 96 + i for i, end in enumerate(ends)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(end, " ") for end in ends]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [(without_digits(), "none"), (merging_over_the_seam(), "one that this tokenizer joins with the prompt")],
)
def test_a_tokenizer_that_gives_the_answer_no_tokens_of_its_own_is_refused(
    tokenizer: Tokenizer, found: str, material: Material
) -> None:
    message = rf"the answer ' \d{{5}}' of passkey: expected at least one token of its own, found {found}"
    with pytest.raises(UsageError, match=message):
        make_item(TASKS["passkey"], LENGTH, encoder=Subject(decoder(), tokenizer), material=material, seed=0, index=0)


@pytest.mark.parametrize(
    ("name", "change", "error", "found"),
    [
        ("needle", {"length": 200}, UsageError, r"needle at length 200: expected room for at least \d+ tokens"),
        ("babilong-qa1", {"babi": None}, UsageError, "babi: .*none named.*--babi"),
        ("babilong-qa1", {"books": None}, UsageError, "books: .*none named.*--books"),
        ("babilong-qa1", {"babi": Path(__file__).parent}, DataError, "qa1_..._test.txt.*no such file"),
    ],
)
def test_what_a_task_lacks_is_said_in_one_line(
    name: str, change: dict[str, object], error: type[Exception], found: str, subject: Subject, material: Material
) -> None:
    paths = {"books": material._books, "babi": material._babi} | {k: v for k, v in change.items() if k != "length"}
    length = change.get("length", LENGTH)
    with pytest.raises(error, match=found):
        make_item(TASKS[name], length, encoder=subject, material=Material(**paths), seed=0, index=0)


@pytest.mark.parametrize("text", ["Mary moved.\n", "1 Where is Mary? \tbathroom\t1\n", "1\n"])
def test_a_file_that_is_not_babi_is_refused_by_its_line(text: str) -> None:
    with pytest.raises(DataError, match="qa1, line 1: expected a number and a sentence"):
        list(parse_stories(text, "qa1"))
