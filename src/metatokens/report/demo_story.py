"""What `metatokens demo` tells, chapter by chapter, in rows of 80 columns."""

import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from metatokens.report.console import PlainConsole

WIDTH = 80


def show_copying(chapter: Any) -> None:
    """Show a `metatokens.demo.Copying`: the example, the accuracies, and what they say."""
    _title("1 Copying")
    example = chapter.example
    _paragraph(
        "A prompt of the test, for the model with meta-attention. Each _ is a meta-token; they stand around the words "
        "to copy, beside the brackets:"
    )
    _lines(textwrap.fill(example.prompt, WIDTH, initial_indent="    ", subsequent_indent="    "), "")
    _named("the words", example.answer)
    for name, answer in (("as trained", example.as_trained), ("meta-tokens zeroed", example.zeroed)):
        _named(name, f"{answer or '(nothing)'}  <- {'right' if answer == example.answer else 'wrong'}")
    rows = chapter.arms[0].rows
    table = _table(f"Right answers in %, {rows[0].instances} prompts in each cell (95% interval)")
    table.add_column("model")
    for row in rows:
        table.add_column(f"{row.length} tokens", justify="right")
    for arm in chapter.arms:
        table.add_row(arm.name, *(_percent(row.sequence_accuracy) for row in arm.rows))
        for name, changed in arm.changed.items():
            table.add_row(f"  {name}", *(_percent(row.sequence_accuracy) for row in changed))
    _lines("")
    _console().print(table)
    _lines(f"Prompts in training had up to {chapter.trained_to} tokens.", "")
    _paragraph(f"What this shows, at {rows[0].length} tokens. {' '.join(_findings(chapter.arms))}")
    _paragraph(
        "What it does not show. Each model was trained once, and other seeds differ, so these rows do not rank the "
        "three. The meta-tokens mark the words of this task: a model that uses the marks misses them, whatever "
        "else meta-tokens do. Whether they compress text, as the paper claims, is measured elsewhere: docs/results.md."
    )


def _findings(arms: Any) -> list[str]:
    """Say what each change does to the accuracy at the first length; it counts if the intervals lie apart."""
    if not any(row.sequence_accuracy.estimate for arm in arms for row in arm.rows):
        return ["Nothing: no model has learned the task in so short a training."]
    findings, is_lower = [], {}
    for arm in arms:
        whole = arm.rows[0].sequence_accuracy
        for name, rows in arm.changed.items():
            changed = rows[0].sequence_accuracy
            lower = is_lower[arm.name, name] = changed.high < whole.low
            effect = "takes accuracy" if lower else "has no effect that this test could show:"
            span = f"from {100 * whole.estimate:.0f}% to {100 * changed.estimate:.0f}%"
            findings.append(f"{_ACTS[name]} of the model with {arm.name} {effect} {span}.")
    zeroed, switched_off = (is_lower[arms[0].name, name] for name in arms[0].changed)
    if zeroed and not switched_off:
        findings.append(
            "So the meta-tokens serve as place marks here: the text reads them, and they need no attention."
        )
    elif zeroed:
        findings.append("So the model needs its meta-tokens, and their attention to one another.")
    else:
        findings.append("So this training has not made the model depend on its meta-tokens.")
    return findings


_ACTS = {"meta-tokens zeroed": "Zeroing the meta-tokens", "meta-attention off": "Switching off the meta-attention"}


def show_reading(chapter: Any) -> None:
    """Show a `metatokens.demo.Reading`: perplexity, cost and a sample."""
    _title("2 Reading")
    table = _table(f"Perplexity on {chapter.documents} documents kept out of training (95% interval)")
    for column in ("model", "parameters", "text tokens", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, arm in (("plain", chapter.plain), ("meta-tokens", chapter.meta)):
        table.add_row(name, f"{arm.parameters:,}", f"{arm.text_tokens:,}", arm.perplexity.to_text(".1f"))
    _console().print(table)
    _paragraph(
        f"On the same tokens meta-attention changes the time of a training step by "
        f"{100 * (chapter.meta_attention_cost - 1):+.0f}%. A text token costs "
        f"{100 * (chapter.cost_per_text_token - 1):+.0f}%, since the meta-tokens take positions of their own. "
        "Both models are far too small, and trained too briefly, to judge the paper by them."
    )
    _paragraph("The model with meta-tokens goes on from a prompt (they are hidden):")
    _lines(*(line for text in chapter.sample.splitlines() for line in textwrap.wrap(text, WIDTH - 4) or [""]), indent=4)
    _lines("")


def show_inside(chapter: Any) -> None:
    """Show where the page is, if there is one."""
    if chapter.page is not None:
        _title("3 Inside")
        _lines("What the copying model with meta-attention computes, for a browser:", "")
        _lines(chapter.page, "", indent=4)


def show_next(folder: Path) -> None:
    """Show commands that go on with what the demonstration made."""
    _title("Go on")
    copying = folder / "recall/meta-attention"
    _lines(
        f"metatokens generate {folder}/meta 'Return a list' --show-meta",
        f"metatokens evaluate {copying} --intervention zero_position",
        f"metatokens info {copying}",
        "",
        indent=4,
    )
    _lines("In Python, with the first ten lines in README.md:", "")
    _lines(f'import metatokens as mt; m = mt.load("{folder}/meta/model")', "", indent=4)


def _console() -> PlainConsole:
    return PlainConsole(width=WIDTH, highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="")


def _title(text: str) -> None:
    _lines("", f"{text} {'-' * (WIDTH - len(text) - 1)}", "")


def _paragraph(text: str) -> None:
    _lines(textwrap.fill(text, WIDTH), "")


def _named(name: str, text: str) -> None:
    _lines(textwrap.fill(text, WIDTH, initial_indent=f"    {name:<20}", subsequent_indent=" " * 24))


def _lines(*lines: str, indent: int = 0) -> None:
    """Print lines as they are; a path stays on one line, to be copied."""
    for line in lines:
        _console().print(textwrap.indent(line, " " * indent), markup=False, soft_wrap=True)


def _percent(interval: Any) -> str:
    """Write an accuracy so briefly that a row of several fits."""
    if interval is None:
        return "n/a"
    return f"{100 * interval.estimate:.0f} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"
