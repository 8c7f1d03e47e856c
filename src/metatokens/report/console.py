"""Results as a person reads them on a terminal; `--json` is for everything else."""

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metatokens.errors import printable
from metatokens.evaluation.statistics import MINIMUM_SEEDS
from metatokens.report.glossary import words
from metatokens.report.numbers import format_estimate, format_large, format_name, format_share, format_value


class PlainConsole(Console):
    """A console that takes no markup and shows a picture for each control character of what it prints."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `Console`."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text as it is measured and printed."""
        return super().render_str(printable(text), **options)


def show_table(title: str, rows: dict[str, Any]) -> None:
    """Show named values, one a row, in the units that their names end with; None, [] and {} are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value in (None, [], {}):
            continue
        table.add_row(format_name(name), format_value(name, value))
    PlainConsole().print(table)


def show_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Show rows that have the same columns."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        left = isinstance(value, str)
        table.add_column(name.replace("_", " "), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(
            *(f"{v:,}" if isinstance(v, int) else f"{v:.3g}" if isinstance(v, float) else v for v in row.values())
        )
    PlainConsole().print(table)


def show_presets(presets: Sequence[Any], *, text_vocab_size: int) -> None:
    """Show `metatokens.evaluation.presets.PresetDescription`s: a line of numbers each, and below it what it is for."""
    console = PlainConsole()

    def show(name: str, *numbers: str) -> None:
        console.print(f"{name:<28}" + "".join(f"{number:>12}" for number in numbers), highlight=False, markup=False)

    show("preset", "parameters", "steps", "text tokens", "FLOP")
    for preset in presets:
        sizes = (preset.parameters, preset.steps, preset.text_tokens)
        flops = "" if preset.training_flops is None else f"{preset.training_flops:.1e}"
        show(preset.name, *("" if size is None else format_large(size) for size in sizes), flops)
        purpose = textwrap.fill(preset.purpose, 76, initial_indent="    ", subsequent_indent="    ")
        console.print(purpose, style="dim", highlight=False, markup=False)
    console.print(
        f"counted with {text_vocab_size:,} text tokens; --text-vocab-size sets another number",
        highlight=False,
    )


def show_long_context(result: Any) -> None:
    """Show a `LongContextReport`."""
    reference = result.config["policies"][0]

    def interval(one: Any, scale: float, digits: int) -> str:
        return "-" if one is None else str(one.to_text(f".{digits}f", scale))

    def cache(row: Any) -> dict[str, Any]:
        return {"columns": round(row.columns), "cache, MiB": round(row.cache_bytes / 2**20, 2)}

    if result.rows:
        rows = [
            {"task": row.task, "length": row.length, "policy": row.policy, "right, %": interval(row.accuracy, 100, 0)}
            | {f"minus {reference}, points": interval(row.difference, 100, 0), **cache(row)}
            | {"peak, MiB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"}
            for row in result.rows
        ]
        show_rows(f"exact match, {result.config['instances']} texts each", rows)
    if result.losses:
        rows = [
            {"policy": loss.policy, "tokens before": f"{loss.distances[0]}-{loss.distances[1]}"}
            | {"nats a token": interval(loss.nats_per_token, 1, 3)}
            | {f"minus {reference}": interval(loss.difference, 1, 3), **cache(loss)}
            for loss in result.losses
        ]
        show_rows(f"loss on {len(result.losses[0].nats)} books by distance from the start", rows)


def show_perplexity(result: Any) -> None:
    """Show a `PerplexityResult`."""
    rows = {
        "documents": len(result.documents),
        "text tokens": result.text_tokens,
        "window": f"{result.text_tokens_per_window} text tokens, {result.positions_per_window} positions",
        "injection": result.injection["kind"],
        "interventions": [intervention["kind"] for intervention in result.interventions] or None,
    }
    for name, scores in (("non-overlapping", result.non_overlapping), (f"sliding by {result.stride}", result.sliding)):
        rows[f"perplexity, {name}"] = _interval(scores.perplexity)
        rows[f"nats per token, {name}"] = _interval(scores.nats_per_token)
        if scores.word_perplexity:
            rows[f"word perplexity, {name}"] = _interval(scores.word_perplexity)
    show_table("perplexity (95% interval over documents)", rows)


def show_recall(result: Any) -> None:
    """Show a `RecallReport`."""
    first = result.rows[0]
    changed = f" with {' and '.join(first.interventions)}" if first.interventions else ""
    are_few = _are_few(first.token_outcomes)
    beside = "each model" if are_few else "95% interval"
    table = Table(title=f"{first.task}{changed}, accuracy ({beside})", title_justify="left")
    table.add_column("prompt tokens")
    for column in ("of tokens", "of whole answers"):
        table.add_column(column, justify="right", no_wrap=not are_few)
    table.add_column("guessing whole answers", justify="right")
    for row in result.rows:
        cells = (row.token_accuracy, row.token_outcomes), (row.sequence_accuracy, row.sequence_outcomes)
        accuracies = [_of_models(interval, outcomes) for interval, outcomes in cells]
        table.add_row("-".join(map(str, row.prompt_tokens)), *accuracies, format_share(row.chance))
    PlainConsole().print(table)


def show_verdicts(results: Any) -> None:
    """Show the verdicts of an analysis, of a graft what its anchors are worth, and what was not run."""
    table = Table(title=results.title, title_justify="left")
    of_claims = ("claim of the paper", "paper", "here (95% interval)", "verdict")
    for column in of_claims if results.verdicts else ("measure", "taken from the anchors", "here (95% interval)"):
        table.add_column(column)
    for verdict in results.verdicts:
        note = f" ({verdict.note})" if verdict.note else ""
        effect = ", ".join(filter(None, (format_estimate(verdict), verdict.beside_paper)))
        table.add_row(verdict.claim, verdict.paper, effect, f"{verdict.verdict}{note}")
    for record in () if results.verdicts else results.records:
        if record.at.keys() == {"intervention"}:
            table.add_row(words(record.measure), record.at["intervention"], format_estimate(record))
    console = PlainConsole()
    console.print(table)
    for line in results.not_run:
        console.print(f"not run: {line}", highlight=False, markup=False)


def _of_models(interval: Any, outcomes: Sequence[Sequence[float]]) -> str:
    """Write an accuracy with its interval, or that of each model where there are too few for one."""
    if interval is None or not _are_few(outcomes):
        return _interval(interval, ".1%")
    return f"{interval.estimate:.1%} ({' / '.join(f'{sum(of_one) / len(of_one):.1%}' for of_one in outcomes)})"


def _are_few(outcomes: Sequence[Sequence[float]]) -> bool:
    return 1 < len(outcomes) < MINIMUM_SEEDS


def _interval(interval: Any, form: str = ",.4g") -> str:
    if interval is None:
        return "n/a"
    if interval.low is None:
        return f"{_written(interval.estimate, form)} (one document: no interval)"
    low, high = (_written(end, form) for end in (interval.low, interval.high))
    return f"{_written(interval.estimate, form)} ({low} to {high})"


def _written(value: float, form: str) -> str:
    """Write a number in a form, or in full where that form would take an exponent."""
    return f"{value:,.0f}" if form[-1] == "g" and abs(value) >= 1_000 else f"{value:{form}}"
