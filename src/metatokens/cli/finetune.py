"""`metatokens finetune`: train on a recall task."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_run, add_verb, run_folder
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "train on a recall task under a curriculum; continues where it stopped; torchrun trains on several devices"
    add_run(add_verb(verbs, "finetune", _run, text, long=True), "metatokens.config.finetuning:FinetuneConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.changes import check_allowed
    from metatokens.config.finetuning import CheckpointStart, FinetuneConfig
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.report.console import show_table
    from metatokens.storage import check_folder
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "finetune")
    config, out = load_preset(options.preset, options.overrides, schema=FinetuneConfig), run_folder(options)
    if isinstance(config.start, CheckpointStart):
        start = ModelFolder(Path(config.start.path))
        start.check_path()
        start.refuse_graft("a recall task")
    check_allowed(options.allow_change, type(config))
    if options.resume is not None:
        from metatokens.training.checkpoint import check_checkpoint

        check_checkpoint(Path(options.resume))
    check_folder(out)
    announce(options, f"preparing {options.preset}")
    from metatokens.training.distributed import is_main_process
    from metatokens.training.finetuning import finetune, plan

    if options.dry_run:
        rows = {"out": str(out), **plan(config, out, resume=options.resume, allow_change=options.allow_change)}
        return emit(options, rows, lambda: show_table("finetune would do", rows))
    result = finetune(
        config, out, stop_after=options.stop_after, resume=options.resume, allow_change=options.allow_change
    )
    if not is_main_process():
        return 0
    following = ("metatokens", "evaluate", out)
    return emit(options, result, lambda: show_table("fine-tuned", asdict(result)), following=following)
