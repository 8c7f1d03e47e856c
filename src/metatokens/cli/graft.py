"""`metatokens graft`: anchors and memory mode for a trained decoder, whose own weights stay as they are."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_run_options, add_verb, run_folder
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "graft a trained decoder of transformers and train the new parts; continues where it stopped"
    parser = add_verb(verbs, "graft", _run, text, long=True)
    parser.add_argument(
        "base", type=Path, help="folder of a decoder of transformers, or its id on the Hugging Face hub"
    )
    parser.add_argument(
        "--preset", default="graft/smollm2-135m", help="preset of the training: graft/smollm2-135m, graft/8b or a file"
    )
    add_run_options(parser, "metatokens.config.grafting:GraftRunConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.changes import check_allowed
    from metatokens.config.grafting import GraftRunConfig
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.data.shards import read_manifest, require_path
    from metatokens.report.console import show_table
    from metatokens.storage import check_folder
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "graft")
    config = load_preset(options.preset, options.overrides, schema=GraftRunConfig)
    config, out = config.model_copy(update={"base": str(options.base)}), run_folder(options)
    read_manifest(require_path(config.data.path))
    ModelFolder(options.base).check_path()
    check_allowed(options.allow_change, type(config))
    if options.resume is not None:
        from metatokens.training.checkpoint import check_checkpoint

        check_checkpoint(options.resume)
    check_folder(out)
    announce(options, f"preparing {options.preset}")
    from metatokens.training.distributed import is_main_process
    from metatokens.training.grafting import plan, train_graft

    if options.dry_run:
        rows = {"out": str(out), **plan(config, out, resume=options.resume, allow_change=options.allow_change)}
        return emit(options, rows, lambda: show_table("graft would do", rows))
    result = train_graft(
        config, out, stop_after=options.stop_after, resume=options.resume, allow_change=options.allow_change
    )
    if not is_main_process():
        return 0
    return emit(options, result, lambda: show_table("grafted", asdict(result)))
