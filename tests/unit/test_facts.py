"""Quoted numbers are those of the committed files, and the check of them notices one that is not."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
RIGHT = 'Guessing is right 36.6%<!-- = percent(hint("in_marked_list"), 1) --> of the time.'


@pytest.fixture(scope="module")
def facts() -> Iterator[Any]:
    sys.path.insert(0, str(DOCS))
    import facts

    yield facts
    sys.path.remove(str(DOCS))


def errors(facts: Any, text: str) -> list[str]:
    return list(facts.check(text, everything=True))


@pytest.mark.slow  # `make facts` does the same
def test_every_number_of_the_documents_is_that_of_its_source(
    facts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["facts.py"])
    code, shown = facts.main(), capsys.readouterr().out
    assert code == 0, shown
    assert shown.endswith(" 0 errors\n")


def test_a_right_number_passes(facts: Any) -> None:
    assert errors(facts, RIGHT) == []


@pytest.mark.parametrize("wrong", ["36.7%", "136.6%", "-36.6%", "3.66%"])
def test_a_wrong_number_is_an_error(facts: Any, wrong: str) -> None:
    (error, *_) = errors(facts, RIGHT.replace("36.6%", wrong))
    assert "line 1: " in error
    assert "is '36.6%'" in error


@pytest.mark.parametrize("expression", ["unknown()", 'hint("nothing")', 'recall("list_recall", "no-arm")'])
def test_a_source_that_is_not_there_is_an_error(facts: Any, expression: str) -> None:
    assert errors(facts, f"Three<!-- = {expression} --> are right.")


@pytest.mark.parametrize("number", ["4.5", "45%", "+0.3", "1,234.5"])
def test_a_number_without_a_source_is_an_error(facts: Any, number: str) -> None:
    (error,) = errors(facts, f"{RIGHT} Another is {number} so far.")
    assert error.startswith(f"{number} has no source")


def test_a_given_number_needs_no_source_in_its_own_paragraph_alone(facts: Any) -> None:
    given = "The paper says 1.40<!-- given: 1.40 (the paper) -->."
    assert errors(facts, given) == []
    assert len(errors(facts, f"{given}\n\nAnd 1.40 again.")) == 1


def test_code_and_addresses_are_no_numbers(facts: Any) -> None:
    assert errors(facts, "    run --k 0.1\n\n`k = 0.1` at [arXiv](https://arxiv.org/abs/2509.16278)") == []


def test_a_table_that_differs_is_an_error(facts: Any) -> None:
    made = facts.TABLES["training-cost"]()
    table = f"<!-- table: training-cost -->\n{made}<!-- /table -->"
    assert errors(facts, table) == []
    (error,) = errors(facts, table.replace("decoder, forward", "decoder, backward", 1))
    assert "table training-cost differs" in error
