"""`metatokens evaluate`: accuracy on a recall task."""

import argparse
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_interventions, add_overrides, add_verb
from metatokens.cli.output import announce, emit
from metatokens.cli.reading import Progress


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "accuracy on a recall task by length of the prompt and intervention, with intervals"
    parser = add_verb(verbs, "evaluate", _run, text, long=True)
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="model, checkpoint or run folders; several count as seeds of one arm"
    )
    add_interventions(parser)
    parser.add_argument("--out", type=Path, help="file that also gets the result as JSON")
    add_overrides(parser, "metatokens.config.finetuning:EvaluateConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.report.console import show_recall, show_table
    from metatokens.storage import check_file, keep_elsewhere, to_json, write_atomically
    from metatokens.training.loading import ModelFolder, check_one_arm, evaluation_config_of

    folders = [ModelFolder(path) for path in options.checkpoints]
    for folder in folders:
        folder.check_path()
    check_one_arm(folders)
    config = evaluation_config_of(folders[0], options.overrides)
    if options.out:
        check_file(options.out)
    announce(options, f"opening {options.checkpoints[0]}")
    from metatokens.data.tokenizer import TextEncoder
    from metatokens.evaluation.interventions import check_interventions, parse_intervention
    from metatokens.evaluation.recall import evaluate_recall, report
    from metatokens.tasks.base import PieceEncoder
    from metatokens.training.distributed import choose_device

    interventions = tuple(parse_intervention(text) for text in options.intervention)
    model = folders[0].open_model()
    check_interventions(model, interventions)
    device = choose_device(config.device)
    if options.dry_run:
        plan = {"models": len(options.checkpoints), **config.model_dump(mode="json")}
        return emit(options, plan, lambda: show_table("evaluate would measure", plan))
    progress, done, total = Progress(), count(1), len(folders) * len(config.lengths)
    rows = evaluate_recall(
        (folder.open_model().to(device) for folder in folders),
        config,
        PieceEncoder(TextEncoder(folders[0].tokenizer)),
        interventions=interventions,
        progress=lambda line: progress.show(line, next(done) / total),
    )
    progress.close()
    result = report(rows, config, [str(path) for path in options.checkpoints], model)
    try:
        if options.out:
            written = to_json(asdict(result), indent=1) + "\n"
            keep_elsewhere(options.out, lambda path: write_atomically(path.resolve(), written))
    finally:
        text = () if folders[0].finetuning else ("--text", "python-docs")
        following = ("metatokens", "analyze", options.checkpoints[0], *text, "--out", "analysis")
        emit(options, result, lambda: show_recall(result), following=following)
    return 0
