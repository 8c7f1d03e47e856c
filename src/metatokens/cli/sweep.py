"""`metatokens sweep`: a grid of runs."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_overrides, add_verb, at_least
from metatokens.cli.output import announce, emit, say


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "train and evaluate a grid of runs; skips runs that are done and continues where it stopped"
    parser = add_verb(verbs, "sweep", _run, text, long=True)
    parser.add_argument("file", type=Path, help="YAML file of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the results")
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--jobs", type=at_least(1), default=1, help="number of runs at a time; they share the cores of this machine"
    )
    places.add_argument("--gpus", help="indices such as 0,1,2; each GPU runs one run at a time")
    parser.add_argument("--figures", action="store_true", help="draw OUT/figures/*.png from the results")
    add_overrides(parser, "metatokens.config.sweep:SweepConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.sweep import load_sweep
    from metatokens.report import require_packages
    from metatokens.report.console import show_rows
    from metatokens.storage import check_folder

    sweep = load_sweep(options.file, options.overrides)
    if options.figures:
        require_packages("--figures")
        check_folder(options.out / "figures")
    check_folder(options.out / "runs")
    announce(options, f"planning {options.file}")
    from metatokens.report.tables import to_rich
    from metatokens.sweep.planning import describe_plan, plan_sweep
    from metatokens.sweep.running import make_slots, parse_gpus
    from metatokens.sweep.writing import run_and_write

    slots = make_slots(options.jobs, parse_gpus(options.gpus))
    runs = plan_sweep(sweep, options.out, str(options.file))
    if options.dry_run:
        plan = describe_plan(sweep, runs)
        return emit(options, plan, lambda: show_rows(f"sweep would run, {plan['matching']}", plan["runs"]))
    results = run_and_write(sweep, runs, options.out, slots, figures=options.figures)
    from metatokens.report.console import PlainConsole

    text = () if sweep.training == "finetune" else ("--text", "python-docs")
    analyze = ("metatokens", "analyze", runs[0].folder.path, *text, "--out", options.out / "analysis")
    following = None if results.failed else analyze
    emit(options, results, lambda: PlainConsole().print(*to_rich(results)), following=following)
    for failure in results.failed:
        say(f"metatokens: {failure.run}: {failure.error}")
    return int(bool(results.failed))
