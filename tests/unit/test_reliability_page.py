"""docs/reliability.md has every row of the specification, and every test that it names exists."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
ROWS = [("R", 17), ("D", 17), ("M", 12), ("S", 7)]


def rows() -> dict[str, str]:
    return dict(re.findall(r"^\| ([RDMS]\d+) \|(.*)\|$", PAGE, re.MULTILINE))


def test_the_page_has_every_row_once_and_in_order() -> None:
    assert list(rows()) == [f"{letter}{number}" for letter, most in ROWS for number in range(1, most + 1)]
    assert len(re.findall(r"^\| [RDMS]\d+ \|", PAGE, re.MULTILINE)) == len(rows())


def test_every_row_names_a_test_or_says_why_there_is_none() -> None:
    assert [name for name, row in rows().items() if ".py::" not in row and "Not tested here" not in row] == []


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > len(rows())
    missing = [(file, name) for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []


def test_the_record_of_a_campaign_says_which_revision_was_harmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("integration", "faults"):
        monkeypatch.syspath_prepend(ROOT / "tests" / folder)
    import campaign

    command = ["campaign.py", "flip_bytes", "--times", "0", "--out", str(tmp_path / "faults.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert campaign.main() == 0
    (outcome,) = json.loads((tmp_path / "faults.json").read_text())["outcomes"].values()
    (revision,) = outcome["revisions"]
    assert re.fullmatch(rf"{re.escape(version('metatokens'))}, ([0-9a-f]{{7,}}(-dirty)?|commit unknown)", revision)
