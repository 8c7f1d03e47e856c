"""`metatokens finetune`: train on a recall task."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_run, add_verb, run_folder
from metatokens.cli.running import train_or_plan


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "train on a recall task under a curriculum; continues where it stopped; torchrun trains on several devices"
    add_run(add_verb(verbs, "finetune", _run, text, long=True), "metatokens.config.finetuning:FinetuneConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.finetuning import CheckpointStart, FinetuneConfig
    from metatokens.config.loading import check_kind_of_run, load_preset
    from metatokens.training.loading import ModelFolder

    check_kind_of_run(options.preset, "finetune")
    config, out = load_preset(options.preset, options.overrides, schema=FinetuneConfig), run_folder(options)
    if isinstance(config.start, CheckpointStart):
        start = ModelFolder(Path(config.start.path))
        start.check_path()
        start.refuse_graft("a recall task")
    train = "metatokens.training.finetuning:finetune"
    following = ("metatokens", "evaluate", out)
    return train_or_plan(options, config, out, train, titles=("finetune would do", "fine-tuned"), following=following)
