"""Results as a person reads them on a terminal; `--json` is for everything else."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from metatokens.evaluation.statistics import MINIMUM_SEEDS
from metatokens.report.numbers import format_estimate


def show_table(title: str, rows: dict[str, Any]) -> None:
    """Show named values, one a row; None is left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is None:
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = "\n".join(str(item) for item in value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)


def show_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Show rows that have the same columns."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        left = isinstance(value, str)
        table.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=left)
    for row in rows:
        table.add_row(
            *(f"{v:,}" if isinstance(v, int) else f"{v:.3g}" if isinstance(v, float) else v for v in row.values())
        )
    Console().print(table)


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
    table = Table(title=f"{result.rows[0].task}, accuracy (95% interval, or each model)", title_justify="left")
    table.add_column("prompt tokens")
    for column in ("of tokens", "of whole answers"):
        table.add_column(column, justify="right")
    for row in result.rows:
        cells = (row.token_accuracy, row.token_outcomes), (row.sequence_accuracy, row.sequence_outcomes)
        table.add_row(row.length, *(_of_models(interval, outcomes) for interval, outcomes in cells))
    Console().print(table)


def show_verdicts(results: Any) -> None:
    """Show the verdicts of an analysis, and what was not run."""
    table = Table(title=results.title, title_justify="left")
    for column in ("claim of the paper", "paper", "here (95% interval)", "verdict"):
        table.add_column(column)
    for verdict in results.verdicts:
        note = f" ({verdict.note})" if verdict.note else ""
        effect = ", ".join(filter(None, (format_estimate(verdict), verdict.beside_paper)))
        table.add_row(verdict.claim, verdict.paper, effect, f"{verdict.verdict}{note}")
    console = Console()
    console.print(table)
    for line in results.not_run:
        console.print(f"not run: {line}", highlight=False, markup=False)


def _of_models(interval: Any, outcomes: Sequence[Sequence[float]]) -> str:
    """Write an accuracy with its interval, or that of each model where there are too few for one."""
    if interval is None or not 1 < len(outcomes) < MINIMUM_SEEDS:
        return _interval(interval, ".1%")
    return f"{interval.estimate:.1%} ({' / '.join(f'{sum(of_one) / len(of_one):.1%}' for of_one in outcomes)})"


def _interval(interval: Any, form: str = ",.4g") -> str:
    if interval is None:
        return "n/a"
    if interval.low is None:
        return f"{interval.estimate:{form}} (one document: no interval)"
    return f"{interval.estimate:{form}} ({interval.low:{form}} to {interval.high:{form}})"
