"""`metatokens extend`: a longer window for a trained model."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_overrides, add_stop_after, add_verb
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "give a model a longer window: scale its RoPE, then train shortly on long blocks; continues where it stopped"
    parser = add_verb(verbs, "extend", _run, text, long=True)
    parser.add_argument("checkpoint", type=Path, help="run, model or checkpoint folder of the trained model")
    parser.add_argument(
        "--method",
        choices=("yarn", "linear", "dynamic", "blockwise"),
        default="yarn",
        help="how RoPE is scaled (default: yarn); blockwise: a model with xPos reads by blocks of half its window",
    )
    parser.add_argument("--factor", type=float, default=4.0, help="new window / present window (default: 4)")
    parser.add_argument("--out", type=Path, required=True, help="run folder; with --no-training, a new model folder")
    parser.add_argument(
        "--preset", default="paper/extend", help="preset of the training: paper/extend, small/extend ..."
    )
    parser.add_argument("--no-training", action="store_true", help="only write the extended model")
    add_stop_after(parser)
    add_overrides(parser, "metatokens.config.schema:PretrainConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.loading import load_preset, parse_overrides
    from metatokens.data.shards import read_manifest
    from metatokens.report.console import show_table
    from metatokens.training.loading import ModelFolder

    ModelFolder(options.checkpoint).check_path()
    load_preset(options.preset)
    if tokens := dict(parse_overrides(options.overrides)).get(("data", "path")):
        read_manifest(Path(str(tokens)).expanduser())
    announce(options, f"opening {options.checkpoint}")
    from metatokens.training.distributed import is_main_process
    from metatokens.training.extension import describe_extension, plan_extension, write_untrained
    from metatokens.training.pretraining import plan, pretrain

    config = plan_extension(
        options.checkpoint,
        method=options.method,
        factor=options.factor,
        preset=options.preset,
        overrides=options.overrides,
    )
    rows = {"out": str(options.out), **describe_extension(config)}
    if options.dry_run:
        more = write_untrained(config, options.out, dry_run=True) if options.no_training else plan(config, options.out)
        rows |= more
        return emit(options, rows, lambda: show_table("extend would do", rows))
    if options.no_training:
        result = write_untrained(config, options.out) if is_main_process() else {}
    else:
        result = {**asdict(pretrain(config, options.out, stop_after=options.stop_after)), **describe_extension(config)}
    if not is_main_process():
        return 0
    following = ("metatokens", "generate", options.out, "Return a list of", "--show-meta")
    return emit(options, result, lambda: show_table("extended", result), following=following)
