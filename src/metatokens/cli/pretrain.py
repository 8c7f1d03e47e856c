"""`metatokens pretrain`: train a preset on shards."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_run, add_verb, run_folder
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "pre-train a preset; continues where it stopped; torchrun trains on several devices"
    add_run(add_verb(verbs, "pretrain", _run, text, long=True), "metatokens.config.schema:PretrainConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.changes import check_allowed
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.data.shards import read_manifest, require_path
    from metatokens.report.console import show_table
    from metatokens.storage import check_folder
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "pretrain")
    config, out = load_preset(options.preset, options.overrides), run_folder(options)
    read_manifest(require_path(config.data.path))
    if config.start_from is not None:
        ModelFolder(config.start_from).check_path()
    check_allowed(options.allow_change, type(config))
    if options.resume is not None:
        from metatokens.training.checkpoint import check_checkpoint

        check_checkpoint(Path(options.resume))
    check_folder(out)
    announce(options, f"preparing {options.preset}")
    from metatokens.training.distributed import is_main_process
    from metatokens.training.pretraining import plan, pretrain

    if options.dry_run:
        rows = {"out": str(out), **plan(config, out, resume=options.resume, allow_change=options.allow_change)}
        return emit(options, rows, lambda: show_table("pretrain would do", rows))
    result = pretrain(
        config, out, stop_after=options.stop_after, resume=options.resume, allow_change=options.allow_change
    )
    if not is_main_process():
        return 0
    following = ("metatokens", "generate", out, "Return a list of", "--show-meta")
    return emit(options, result, lambda: show_table("pre-trained", asdict(result)), following=following)
