"""The results of a sweep as tables: Markdown for a file, and for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from metatokens.evaluation.statistics import MINIMUM_SEEDS, Interval
from metatokens.evaluation.survival import restricted_mean, restricted_mean_interval
from metatokens.report.contrasts import MARGIN, Contrast, contrasts
from metatokens.report.numbers import format_share
from metatokens.report.sweep_results import (
    AccuracyRow,
    CellResult,
    EvaluationResult,
    SweepResults,
    arm_name,
    panels,
    solve_times,
)

if TYPE_CHECKING:
    from rich.table import Table

    from metatokens.evaluation.recall import RecallReport, RecallRow

_PERPLEXITY_LEGEND = (
    "Sliding windows; means of the seeds with the 95% interval over documents, which does not hold the spread of the "
    "seeds. Differences are from the reference on the same documents, in nats per word."
)
GUESSING = "guessing"
"""The row of what guesses get right, as each task states it."""
_SOLVE_LEGEND = (
    "Mean up to the last step of the curriculum (the area below the Kaplan-Meier curve), with its 95% interval over "
    "seeds; +: not solved by then."
)


def evaluation_names(results: SweepResults) -> list[str]:
    """Return the names of the evaluations that some cell has, in their order."""
    return list(dict.fromkeys(evaluation.name for cell in results.cells for evaluation in cell.evaluations))


def find_evaluation(cell: CellResult, name: str) -> EvaluationResult | None:
    """Return an evaluation of a cell by its name."""
    return next((evaluation for evaluation in cell.evaluations if evaluation.name == name), None)


def to_markdown(results: SweepResults) -> str:
    """Write results as Markdown tables, one for each evaluation and task (or other labels beside the arm)."""
    lines = ["# Results of the sweep", "", f"{results.done} of {results.runs} runs are done. {_legend(results)}", ""]
    for title, cells, lengths in _tables(results):
        compared = any(row.difference for _, evaluation in cells for row in evaluation.rows)
        header = [results.arm_axis or "run", "parameters", "training FLOPs", "text tokens", "steps", "seeds"]
        header += ["window", "original window", "trained to"]
        for length in lengths:
            header += [f"{length} tokens"] + ([f"{length} diff"] if compared else [])
        lines += [f"## {title}", "", _line(header), "|---|" + "---:|" * (len(header) - 1)]
        for cell, evaluation in cells:
            texts = [arm_name(results, cell), f"{cell.parameters:,}", f"{cell.training_flops:.2e}"]
            texts += [f"{cell.text_tokens:,.0f}", f"{cell.steps:,}", str(len(cell.seeds))]
            of_model = cell.window, cell.original_window, cell.trained_to
            texts += ["" if length is None else f"{length:,}" for length in of_model]
            for row in _rows_at(evaluation, lengths):
                texts += [_percent(row)] + ([_points(row)] if compared else [])
            lines.append(_line(texts))
        if guesses := _guesses(cells, lengths):
            per_length = [text for guess in guesses for text in (guess, *([""] if compared else []))]
            lines.append(_line([GUESSING, *[""] * (len(header) - 1 - len(per_length)), *per_length]))
        lines.append("")
    for table in _plain_tables(results):
        lines += [
            f"## {table.title}",
            "",
            table.legend,
            "",
            _line(table.header),
            "|---|" + "---:|" * (len(table.header) - 1),
        ]
        lines += [*map(_line, table.rows), ""]
    if differences := contrasts(results):
        lines += ["## Contrasts", "", _contrast_legend(results), "", *_contrast_lines(differences), ""]
    if results.failed:
        lines += ["## Failed", "", *(f"- {failure.run}: {failure.error}" for failure in results.failed), ""]
    return "\n".join(lines)


def asked_to_markdown(reports: Mapping[str, "RecallReport"]) -> str:
    """Write reports of `metatokens evaluate` as one table: a row for each, with its accuracy at each length.

    Args:
        reports: by the names of their rows.
    """
    lengths = list(dict.fromkeys(row.length for report in reports.values() for row in report.rows))
    lines = [_line(["asked", "models", *(f"{length} tokens" for length in lengths)])]
    lines.append("|---|" + "---:|" * (1 + len(lengths)))
    for name, report in reports.items():
        texts = {row.length: _share(row) for row in report.rows}
        lines.append(_line([name, str(len(report.models)), *(texts.get(length, "") for length in lengths)]))
    return "\n".join([*lines, ""])


def _share(row: "RecallRow") -> str:
    """Return the accuracy of whole answers, with its interval or model by model."""
    accuracy = row.sequence_accuracy
    if accuracy is None:
        return "n/a"
    by_model = [sum(outcomes) / len(outcomes) for outcomes in row.sequence_outcomes]
    return f"{100 * accuracy.estimate:.1f}%{_spread(accuracy, by_model, '.1f')}"


def to_rich(results: SweepResults) -> Iterator["Table"]:
    """Yield results as tables for a terminal."""
    from rich.table import Table

    for title, cells, lengths in _tables(results):
        table = Table(title=title, title_justify="left")
        table.add_column(results.arm_axis or "run", no_wrap=True)
        for column in ("parameters", "FLOPs", "seeds", "trained to", *lengths):
            table.add_column(column, justify="right")
        for cell, evaluation in cells:
            spent = (
                arm_name(results, cell),
                f"{cell.parameters:,}",
                f"{cell.training_flops:.1e}",
                str(len(cell.seeds)),
                f"{cell.trained_to:,}",
            )
            table.add_row(*spent, *(_percent(row, digits=0) for row in _rows_at(evaluation, lengths)))
        if guesses := _guesses(cells, lengths):
            table.add_row(GUESSING, *[""] * (len(table.columns) - 1 - len(guesses)), *guesses)
        yield table
    for plain in _plain_tables(results):
        table = Table(*plain.header, title=plain.title, title_justify="left")
        for texts in plain.rows:
            table.add_row(*texts)
        yield table


def _legend(results: SweepResults) -> str:
    reference = results.sweep["reference"]
    text = (
        f"Share of whole answers that are right, with the 95% interval over seeds and instances (of one seed: over "
        f"instances alone; of fewer than {MINIMUM_SEEDS} seeds: each of them); n/a: longer than the model can "
        "represent. Windows are in positions, lengths of training and test in text tokens of the prompt."
    )
    if reference is None or not results.cells:
        return text
    matching = results.cells[0].matching
    paired = f"diff: minus {reference} on the same seeds and instances, in percentage points."
    return f"{text} {paired} Every arm has {matching}."


def _contrast_legend(results: SweepResults) -> str:
    return (
        f"Every arm minus {results.sweep['reference']}, in percentage points, by seed. The seed is the unit of the "
        f"tests (sign flips); alike: a difference beyond {100 * MARGIN:.0f} points is rejected. Holm's correction is "
        "over all rows."
    )


def _contrast_lines(compared: Sequence[Contrast]) -> Iterator[str]:
    yield _line(["", "arm", "length", "by seed", "p", "p alike", "verdict"])
    yield "|---|---|---|---|---:|---:|---|"
    for one in compared:
        by_seed = " / ".join(f"{100 * difference:+.1f}" for difference in one.differences)
        where = f"{one.panel}: {one.evaluation}"
        p_values = f"{one.p_value:.3f}", f"{one.equivalence_p:.3f}"
        yield _line([where, one.arm, one.length, by_seed, *p_values, one.verdict])


class _PlainTable(NamedTuple):
    title: str
    legend: str
    header: list[str]
    rows: list[list[str]]


def _plain_tables(results: SweepResults) -> Iterator[_PlainTable]:
    """Yield the tables whose cells are texts already: perplexities, and steps to solve."""
    stopping = []
    for panel, cells in panels(results).items():
        for name in dict.fromkeys(row.name for cell in cells for row in cell.perplexities):
            yield _perplexity_table(results, f"{panel}: {name}", cells, name)
        stopping += [(panel, cell) for cell in cells if any(one.solved is not None for one in cell.trainings)]
    if stopping:
        yield _solve_table(results, stopping)


def _perplexity_table(results: SweepResults, title: str, cells: Sequence[CellResult], name: str) -> _PlainTable:
    header = [results.arm_axis or "run", "parameters", "training FLOPs", "text tokens", "steps", "seeds"]
    header += ["perplexity", "nats per word", "difference", "difference by seed"]
    rows = []
    for cell in cells:
        spent = [arm_name(results, cell), f"{cell.parameters:,}", f"{cell.training_flops:.2e}"]
        spent += [f"{cell.text_tokens:,.0f}", f"{cell.steps:,}", str(len(cell.seeds))]
        for row in cell.perplexities:
            if row.name == name:
                scores = [f"{row.perplexity:.2f}", _nats(row.nats_per_word, ".4f"), _nats(row.difference, "+.4f")]
                rows.append([*spent, *scores, " / ".join(f"{one:+.4f}" for one in row.difference_by_seed)])
    return _PlainTable(title, _PERPLEXITY_LEGEND, header, rows)


def _nats(interval: Interval | None, form: str) -> str:
    return "" if interval is None else interval.to_text(form)


def _solve_table(results: SweepResults, cells: Sequence[tuple[str, CellResult]]) -> _PlainTable:
    rows = []
    for panel, cell in cells:
        times = solve_times(cell)
        mean = f"{restricted_mean(times):,.0f}"
        if len(times.times) >= MINIMUM_SEEDS:
            mean = restricted_mean_interval(times, seed=0).to_text(",.0f")
        by_seed = " / ".join(f"{one.steps:,}{'' if one.solved else '+'}" for one in cell.trainings)
        solved = f"{times.observed.sum()} of {len(times.times)}"
        seconds = f"{sum(one.cpu_seconds for one in cell.trainings):,.0f}"
        rows.append([panel, arm_name(results, cell), solved, mean, by_seed, seconds])
    header = ["task", results.arm_axis or "run", "solved", "steps", "steps by seed", "CPU-seconds"]
    return _PlainTable("Steps to solve", _SOLVE_LEGEND, header, rows)


def _tables(results: SweepResults) -> Iterator[tuple[str, list[tuple[CellResult, EvaluationResult]], list[str]]]:
    """Yield the title of each table, its cells and its lengths."""
    for name in evaluation_names(results):
        for panel, cells in panels(results).items():
            measured = [(cell, evaluation) for cell in cells if (evaluation := find_evaluation(cell, name))]
            if measured:
                changed = ", ".join(measured[0][1].interventions)
                lengths = list(dict.fromkeys(row.length for _, evaluation in measured for row in evaluation.rows))
                yield f"{panel}: {name}" + (f" ({changed})" if changed else ""), measured, lengths


def _guesses(cells: Sequence[tuple[CellResult, EvaluationResult]], lengths: list[str]) -> list[str]:
    """Return what guesses get right at each length; nothing where no row knows it."""
    by_length = [_rows_at(evaluation, lengths) for _, evaluation in cells]
    guesses = []
    for rows in zip(*by_length, strict=True):
        texts = {format_share(row.chance) for row in rows if row is not None and row.chance is not None}
        guesses.append(" or ".join(sorted(texts)))
    return guesses if any(guesses) else []


def _rows_at(evaluation: EvaluationResult, lengths: list[str]) -> list[AccuracyRow | None]:
    by_length = {row.length: row for row in evaluation.rows}
    return [by_length.get(length) for length in lengths]


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _percent(row: AccuracyRow | None, digits: int = 1) -> str:
    """Return the accuracy of whole answers and its spread; n/a where there is none, nothing where none was measured."""
    if row is None:
        return ""
    interval = row.sequence_accuracy
    if interval is None:
        return "n/a"
    return f"{100 * interval.estimate:.{digits}f}%{_spread(interval, row.sequence_by_seed, f'.{digits}f')}"


def _points(row: AccuracyRow | None) -> str:
    """Return the difference from the reference in percentage points."""
    interval = None if row is None else row.difference
    if row is None or interval is None:
        return ""
    return f"{100 * interval.estimate:+.1f}{_spread(interval, row.difference_by_seed, '+.1f')}"


def _spread(interval: Interval, by_seed: Sequence[float], form: str) -> str:
    """Return the interval, or one number a seed where there are too few seeds for one."""
    if 1 < len(by_seed) < MINIMUM_SEEDS:
        return f" ({' / '.join(f'{100 * one:{form}}' for one in by_seed)})"
    if interval.low is None or interval.high is None:
        return ""
    return f" ({100 * interval.low:{form}} to {100 * interval.high:{form}})"
