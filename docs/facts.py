"""Check every number that README, docs, experiments and benchmarks quote against the committed JSON that it comes from.

A comment after a number names its source, a Python expression over the functions of the package measured:

    Perplexity is 215.7<!-- = perplexity("meta/uniform/text") --> with meta-tokens.

The text before the comment must end with the value of the expression. A number of the paper or of a setting is named
once in its paragraph, `<!-- given: 1.40 -->`. Whole tables are made here: the text between `<!-- table: NAME -->`
and `<!-- /table -->` must be `TABLES[NAME]()`. In the parts of `MEASURED` a percentage or a decimal number with none
of the three is an error.

    python docs/facts.py            # exit code 1, and a line for each number that differs
    python docs/facts.py --write    # makes the tables anew; numbers in sentences are left to a person
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from measured import NAMES, TABLES
from measured.inside import INSIDE
from measured.recall import RECALL
from measured.source import ROOT

MEASURED = {
    "README.md": "## Does it hold?",
    "docs/results.md": "",
    "docs/replication.md": "",
    f"{RECALL}/README.md": "",
    f"{RECALL}/contrasts.md": "",
    f"{INSIDE}/README.md": "",
}
"""Files in which every number needs a source: from this heading to the next of its rank, or all of it."""
_FACT = re.compile(r"<!-- = (.+?) -->", re.DOTALL)
_GIVEN = re.compile(r"<!-- given: (.+?) -->", re.DOTALL)
_TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d[\d,]*\.\d+%?|[+-]?\d[\d,]*(?:\.\d+)?%")
_NO_PROSE = re.compile(r"```.*?```|^ {4}.*$|`[^`\n]*`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)


def check(text: str, *, everything: bool) -> Iterator[str]:
    """Yield an error for each quoted number that differs from its source.

    Args:
        text: of a Markdown file.
        everything: every percentage and decimal number needs a source.
    """
    plain, start = [], 0
    for fact in _FACT.finditer(text):
        before = text[start : fact.start()]
        quoted = _evaluate(fact[1])
        if not re.search(rf"(?<![\d.+-]){re.escape(quoted)}$", before):
            yield f"line {_line(text, fact.start())}: ...{before[-40:]!r}, but {fact[1]} is {quoted!r}"
        plain.append(before.removesuffix(quoted) if everything else "")
        start = fact.end()
    for table in _TABLE.finditer(text):
        if table[1] not in TABLES:
            yield f"line {_line(text, table.start())}: no table {table[1]}; there are {', '.join(TABLES)}"
        elif table[2] != TABLES[table[1]]():
            yield f"line {_line(text, table.start())}: table {table[1]} differs; run docs/facts.py --write"
    if everything:
        rest = _TABLE.sub("", "\0".join([*plain, text[start:]]))
        for paragraph in re.split(r"\n\s*\n|\n(?=[|-])", _NO_PROSE.sub("", rest)):
            given = [number for match in _GIVEN.findall(paragraph) for number in match.split()]
            for number in _NUMBER.findall(_GIVEN.sub("", paragraph)):
                if number not in given:
                    yield f"{number} has no source, in: {' '.join(paragraph.split())[:80]}"


def _evaluate(expression: str) -> str:
    try:
        return str(eval(expression, {"__builtins__": {}, **NAMES}))  # of our own documents
    except (ArithmeticError, AssertionError, LookupError, NameError, StopIteration, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def part(text: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its rank; all text if there is no heading."""
    if not heading:
        return text
    start = text.index(heading)
    end = text.find(f"\n{heading.split(' ', maxsplit=1)[0]} ", start + 1)
    return text[start:] if end < 0 else text[start:end]


def documents() -> list[Path]:
    folders = ("docs", "experiments", "benchmarks")
    return [ROOT / "README.md", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.md")))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the tables anew")
    options = parser.parse_args()
    errors, num_facts = [], 0
    for path in documents():
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        if options.write:
            text = _TABLE.sub(lambda table: f"<!-- table: {table[1]} -->\n{TABLES[table[1]]()}<!-- /table -->", text)
            path.write_text(text, encoding="utf-8")
        num_facts += len(_FACT.findall(text)) + len(_TABLE.findall(text))
        found = [*check(text, everything=False)]
        if name in MEASURED:
            unsourced = check(part(text, MEASURED[name]), everything=True)
            found += [error for error in unsourced if "has no source" in error]
        errors += [f"{name}: {error}" for error in found]
    print("\n".join([*errors, f"{num_facts} numbers and tables, {len(errors)} errors"]))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
