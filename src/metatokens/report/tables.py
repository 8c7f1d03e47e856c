"""The results of a sweep as tables: Markdown for a file, and for a terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from metatokens.report.sweep_results import AccuracyRow, CellResult, EvaluationResult, SweepResults

if TYPE_CHECKING:
    from rich.table import Table


def panels(results: SweepResults) -> dict[str, list[CellResult]]:
    """Return the cells that are compared with one another, under the labels of the other axes as one name."""
    grouped: dict[str, list[CellResult]] = {}
    for cell in results.cells:
        axes = [axis for axis, labels in results.sweep["axes"].items() if axis != results.arm_axis and len(labels) > 1]
        labels = [cell.labels[axis] for axis in axes]
        grouped.setdefault(", ".join(labels) or cell.task, []).append(cell)
    return grouped


def arm_name(results: SweepResults, cell: CellResult) -> str:
    """Return the label that a cell has among those it is compared with."""
    return cell.labels[results.arm_axis] if results.arm_axis else cell.task


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
        for length in lengths:
            header += [f"{length} tokens"] + ([f"{length} diff"] if compared else [])
        lines += [f"## {title}", "", _line(header), "|---|" + "---:|" * (len(header) - 1)]
        for cell, evaluation in cells:
            texts = [arm_name(results, cell), f"{cell.parameters:,}", f"{cell.training_flops:.2e}"]
            texts += [f"{cell.text_tokens:,.0f}", f"{cell.steps:,}", str(len(cell.seeds))]
            for row in _rows_at(evaluation, lengths):
                texts += [_percent(row)] + ([_points(row)] if compared else [])
            lines.append(_line(texts))
        lines.append("")
    if results.failed:
        lines += ["## Failed", "", *(f"- {failure.run}: {failure.error}" for failure in results.failed), ""]
    return "\n".join(lines)


def to_rich(results: SweepResults) -> Iterator["Table"]:
    """Yield results as tables for a terminal."""
    from rich.table import Table

    for title, cells, lengths in _tables(results):
        table = Table(title=title, title_justify="left")
        table.add_column(results.arm_axis or "run", no_wrap=True)
        for column in ("parameters", "FLOPs", "seeds", *lengths):
            table.add_column(column, justify="right")
        for cell, evaluation in cells:
            spent = (
                arm_name(results, cell),
                f"{cell.parameters:,}",
                f"{cell.training_flops:.1e}",
                str(len(cell.seeds)),
            )
            table.add_row(*spent, *(_percent(row, digits=0) for row in _rows_at(evaluation, lengths)))
        yield table


def _legend(results: SweepResults) -> str:
    reference = results.sweep["reference"]
    text = (
        "Share of whole answers that are right, with the 95% interval over seeds and instances (of one seed: over "
        "instances alone); n/a: longer than the model can represent."
    )
    if reference is None or not results.cells:
        return text
    matching = results.cells[0].matching
    paired = f"diff: minus {reference} on the same seeds and instances, in percentage points."
    return f"{text} {paired} Every arm has {matching}."


def _tables(results: SweepResults) -> Iterator[tuple[str, list[tuple[CellResult, EvaluationResult]], list[str]]]:
    """Yield the title of each table, its cells and its lengths."""
    for name in evaluation_names(results):
        for panel, cells in panels(results).items():
            asked = [(cell, evaluation) for cell in cells if (evaluation := find_evaluation(cell, name))]
            if asked:
                changed = ", ".join(asked[0][1].interventions)
                lengths = list(dict.fromkeys(row.length for _, evaluation in asked for row in evaluation.rows))
                yield f"{panel}: {name}" + (f" ({changed})" if changed else ""), asked, lengths


def _rows_at(evaluation: EvaluationResult, lengths: list[str]) -> list[AccuracyRow | None]:
    by_length = {row.length: row for row in evaluation.rows}
    return [by_length.get(length) for length in lengths]


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _percent(row: AccuracyRow | None, digits: int = 1) -> str:
    """Return the accuracy of whole answers with its interval; n/a where there is none, nothing where none was asked."""
    if row is None:
        return ""
    interval = row.sequence_accuracy
    if interval is None:
        return "n/a"
    text = f"{100 * interval.estimate:.{digits}f}%"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f})"


def _points(row: AccuracyRow | None) -> str:
    """Return the difference from the reference in percentage points."""
    interval = None if row is None else row.difference
    if interval is None:
        return ""
    text = f"{100 * interval.estimate:+.1f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
