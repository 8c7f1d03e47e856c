"""`metatokens export`: one folder of safetensors from any checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "write the model of a run or of any checkpoint as a folder for from_pretrained, its parts put together"
    parser = add_verb(verbs, "export", _run, text)
    parser.add_argument("checkpoint", type=Path, help="run, model or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the model")


def _run(options: argparse.Namespace) -> int:
    from metatokens.training.loading import ModelFolder

    ModelFolder(options.checkpoint).check_path()
    announce(options, f"opening {options.checkpoint}")
    from metatokens.report.console import show_table
    from metatokens.training.exporting import export_model

    result = export_model(options.checkpoint, options.out)
    following = ("metatokens", "info", options.out)
    return emit(options, result, lambda: show_table("exported", result), following=following)
