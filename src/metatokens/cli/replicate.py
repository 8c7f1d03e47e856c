"""`metatokens replicate`: the whole decomposition, with its cost first."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit, say

if TYPE_CHECKING:
    from metatokens.replication.cost import PartCost


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "run all experiments that tell what meta-tokens add, their cost first; continues where it stopped"
    parser = add_verb(verbs, "replicate", _run, text, long=True)
    parser.add_argument(
        "--scale",
        default="tiny",
        help="tiny (two cores), small (one GPU), paper (four GPUs), or a folder with plan.yaml",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the results")
    parser.add_argument("--books", type=Path, help="folder with train/ and test/: texts to train on and to score")
    parser.add_argument("--part", action="append", default=[], help="run this part alone, such as E1; may be repeated")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=at_least(1), default=2, help="number of runs at a time on this machine")
    places.add_argument("--gpus", help="indices such as 0,1,2,3; each GPU runs one run at a time")
    parser.add_argument("--gpu", help="kind of GPU for the estimate, such as h100")
    parser.add_argument("--tables", action="store_true", help="run nothing; write the tables of what is done so far")


def _run(options: argparse.Namespace) -> int:
    from metatokens.replication.plan import load_scale
    from metatokens.report import require_packages
    from metatokens.storage import check_folder

    scale = load_scale(options.scale)
    require_packages("replicate")
    check_folder(options.out)
    announce(options, f"planning {options.scale}")
    from metatokens.cli import main
    from metatokens.replication.cost import estimate
    from metatokens.replication.running import check_books, choose_parts, run_part, write_tables
    from metatokens.report.console import show_rows

    out = options.out.resolve()
    parts = choose_parts(scale, options.part)
    if options.tables:
        tables = write_tables(scale, out)
        return emit(options, {"tables": str(tables)}, lambda: print(tables))
    one = options.gpu or scale.plan.gpu or "core"
    costs = [cost for cost in estimate(scale, out, gpu=options.gpu) if cost.name in {part.name for part in parts}]
    result = {"scale": scale.name, "hours_of": one, "parts": [asdict(cost) for cost in costs]}
    if options.dry_run:
        title = f"replicate {scale.name} would train, in hours on one {one} if no training ends early"
        return emit(options, result, lambda: show_rows(title, [_row(cost) for cost in costs]))
    check_books(parts, out, options.books)
    for cost in costs:
        left = f"{cost.to_do} of {cost.trainings} trainings to do"
        say(f"{cost.name}: {left}, {cost.hours:,.1f} hours on one {one} if none ends early")
    slots = ("--gpus", options.gpus) if options.gpus else ("--jobs", str(options.jobs))
    failed = 0
    for part in parts:
        code = run_part(scale, part, out, slots=slots, books=options.books, command=main, say=say)
        if code > 1:
            return code
        tables = write_tables(scale, out)
        failed = max(failed, code)
    return emit(options, {**result, "tables": str(tables)}, lambda: print(tables)) or failed


def _row(cost: "PartCost") -> dict[str, Any]:
    return {
        "part": cost.name,
        "question": cost.question,
        "trainings": cost.trainings,
        "to do": cost.to_do,
        "hours": round(cost.hours, 1),
    }
