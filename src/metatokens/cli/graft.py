"""`metatokens graft`: anchors and memory mode for a trained decoder, whose own weights stay as they are."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_run_options, add_verb, run_folder
from metatokens.cli.running import train_or_plan


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
    from metatokens.config.grafting import GraftRunConfig
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.data.shards import read_manifest, require_path
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "graft")
    config = load_preset(options.preset, options.overrides, schema=GraftRunConfig)
    config, out = config.model_copy(update={"base": str(options.base)}), run_folder(options)
    read_manifest(require_path(config.data.path))
    ModelFolder(options.base).check_path()
    train = "metatokens.training.grafting:train_graft"
    following = ("metatokens", "generate", out, "Return a list of")
    return train_or_plan(options, config, out, train, titles=("graft would do", "grafted"), following=following)
