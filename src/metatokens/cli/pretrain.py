"""`metatokens pretrain`: train a preset on shards."""

import argparse
from typing import Any

from metatokens.cli.arguments import add_run, add_verb, run_folder
from metatokens.cli.running import train_or_plan


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "pre-train a preset; continues where it stopped; torchrun trains on several devices"
    add_run(add_verb(verbs, "pretrain", _run, text, long=True), "metatokens.config.schema:PretrainConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.data.shards import read_manifest, require_path
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "pretrain")
    config, out = load_preset(options.preset, options.overrides), run_folder(options)
    read_manifest(require_path(config.data.path))
    if config.start_from is not None:
        ModelFolder(config.start_from).check_path()
    train = "metatokens.training.pretraining:pretrain"
    following = ("metatokens", "generate", out, "Return a list of", "--show-meta")
    return train_or_plan(options, config, out, train, titles=("pretrain would do", "pre-trained"), following=following)
