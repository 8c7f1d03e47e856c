"""Results as a person reads them on a terminal; `--json` is for everything else."""

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from metatokens.evaluation.statistics import MINIMUM_SEEDS
from metatokens.report.numbers import format_estimate, format_large, format_value


def show_table(title: str, rows: dict[str, Any]) -> None:
    """Show named values, one a row, in the units that their names end with; None, [] and {} are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value in (None, [], {}):
            continue
        table.add_row(name.replace("_", " "), format_value(name, value))
    Console().print(table)


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
    Console().print(table)


def show_presets(presets: Sequence[Any]) -> None:
    """Show `metatokens.evaluation.presets.PresetDescription`s: a line of numbers each, and below it what it is for."""
    console = Console()

    def show(name: str, *numbers: str) -> None:
        console.print(f"{name:<28}" + "".join(f"{number:>12}" for number in numbers), highlight=False, markup=False)

    show("preset", "parameters", "steps", "text tokens", "FLOP")
    for preset in presets:
        sizes = (preset.parameters, preset.steps, preset.text_tokens)
        flops = "" if preset.training_flops is None else f"{preset.training_flops:.1e}"
        show(preset.name, *("" if size is None else format_large(size) for size in sizes), flops)
        purpose = textwrap.fill(preset.purpose, 76, initial_indent="    ", subsequent_indent="    ")
        console.print(purpose, style="dim", highlight=False, markup=False)


def show_demo(result: Any) -> None:
    """Show a `metatokens.demo.DemoResult`."""
    console = Console()
    table = Table(title="Plain and meta-token model, same text tokens, same seed", title_justify="left")
    for column in ("", "parameters", "text tokens", "tokens/s", "perplexity (95% interval)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, arm in (("plain", result.plain), ("meta-tokens", result.meta)):
        table.add_row(
            name,
            f"{arm.parameters:,}",
            f"{arm.text_tokens:,}",
            f"{arm.text_tokens_per_second:,.0f}",
            _interval(arm.perplexity),
        )
    console.print(table)
    console.print(
        f"Meta-attention changes the time of a training step by {100 * (result.meta_attention_cost - 1):+.1f}% on the "
        f"same tokens; with the meta-tokens' own positions, a text token's by "
        f"{100 * (result.cost_per_text_token - 1):+.1f}%.",
        highlight=False,
    )
    console.print(
        f"\nA sample of the meta-token model (meta-tokens hidden):\n\n{result.sample}\n", highlight=False, markup=False
    )
    table = Table(
        title="Copying a marked span of words: % right by tokens of the prompt (95% interval)", title_justify="left"
    )
    for column in ("", "parameters", "training FLOPs", *(row.length for row in result.recall[0].rows)):
        table.add_column(column, justify="left" if not column else "right")
    for recall in result.recall:
        accuracies = [_percent(row.sequence_accuracy) for row in recall.rows]
        table.add_row(recall.name, f"{recall.parameters:,}", f"{recall.training_flops:.2e}", *accuracies)
    console.print(table)
    if result.report is not None:
        console.print("\nWhat the meta-attention model does inside, to open in a browser:\n", highlight=False)
        console.print(f"    {result.report}", highlight=False, markup=False, soft_wrap=True)
    console.print("\nThe model is a Hugging Face checkpoint:\n", highlight=False)
    console.print("    import metatokens; from transformers import AutoModelForCausalLM", highlight=False)
    load = f'    model = AutoModelForCausalLM.from_pretrained("{result.meta.model}")'
    console.print(load, highlight=False, markup=False, soft_wrap=True)  # to be copied as one line


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


def _percent(interval: Any) -> str:
    """Write an accuracy so briefly that a table of several lengths fits a terminal."""
    if interval is None:
        return "n/a"
    return f"{100 * interval.estimate:.0f} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"
