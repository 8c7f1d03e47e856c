"""`metatokens demo`: from the text that comes with Python to trained models and a report."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit, say


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "train a plain and a meta-token model on the text that comes with Python, compare them, generate"
    parser = add_verb(verbs, "demo", _run, text, long=True)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demonstration")
    parser.add_argument(
        "--text-tokens", type=at_least(1), default=1_000_000, help="text tokens that each language model sees"
    )
    parser.add_argument(
        "--recall-steps", type=at_least(1), default=400, help="training steps of each model on the recall task"
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.report.console import show_demo, show_table
    from metatokens.storage import check_folder

    check_folder(options.out)
    announce(options, "starting")
    from metatokens.demo import DEMO_BYTES, demo_configs, recall_configs, run_demo

    check_folder(options.out, num_bytes=DEMO_BYTES)
    if options.dry_run:
        configs = {**demo_configs(options.out, options.text_tokens), **recall_configs(options.recall_steps)}
        rows = {arm: f"{config.total_steps} steps" for arm, config in configs.items()}
        return emit(options, {"out": str(options.out), **rows}, lambda: show_table("demo would train", rows))
    result = run_demo(options.out, text_tokens=options.text_tokens, recall_steps=options.recall_steps, say=say)
    return emit(options, result, lambda: show_demo(result))
