"""`metatokens demo`: a story of what tiny models do with meta-tokens, told while they are trained."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit, say

OPENING = """\
What does a language model do with meta-tokens? {size}

  1 Copying   three tiny models learn to copy marked words{copying}
              one prompt, with its meta-tokens and with them zeroed; accuracy
  2 Reading   two tiny models read Python's own documentation{reading}
              plain and with meta-tokens: perplexity, cost, a sample
  3 Inside    a page on what the first model computes{inside}

All of it is kept in {folder}. If you stop it, the same command goes on.
"""
_AT_FULL_SIZE = {
    "size": "A demonstration in about seven\nminutes on two quiet cores; it downloads nothing.",
    "copying": "     about 3 minutes",
    "reading": "  about 3 minutes",
    "inside": "          about 1 minute",
}
_AS_A_TRIAL = {
    "size": "A trial: shorter than the\nwhole demonstration, and it measures less; it downloads nothing.",
    "copying": "",
    "reading": "",
    "inside": "",
}


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "train tiny models on text that comes with Python, and show what they do with their meta-tokens"
    parser = add_verb(verbs, "demo", _run, text, long=True)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demonstration")
    parser.add_argument(
        "--text-tokens", type=at_least(1), default=700_000, help="text tokens that each language model sees"
    )
    parser.add_argument(
        "--recall-steps", type=at_least(1), default=400, help="training steps of each model on the recall task"
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.storage import check_folder

    check_folder(options.out)
    announce(options, "starting")
    from metatokens.demo import DEMO_BYTES, Copying, Reading, copying_configs, is_full_size, reading_configs, run_demo
    from metatokens.report.console import show_table
    from metatokens.report.demo_story import show_copying, show_inside, show_next, show_reading

    check_folder(options.out, num_bytes=DEMO_BYTES)
    if options.dry_run:
        configs = {**copying_configs(options.recall_steps), **reading_configs(options.out, options.text_tokens)}
        rows = {arm: f"{config.total_steps} steps" for arm, config in configs.items()}
        return emit(options, {"out": str(options.out), **rows}, lambda: show_table("demo would train", rows))

    def show(chapter: Any) -> None:
        if not options.json:
            {Copying: show_copying, Reading: show_reading}.get(type(chapter), show_inside)(chapter)

    full = is_full_size(options.text_tokens, options.recall_steps)
    say(OPENING.format(folder=options.out, **(_AT_FULL_SIZE if full else _AS_A_TRIAL)))
    result = run_demo(
        options.out, text_tokens=options.text_tokens, recall_steps=options.recall_steps, say=say, show=show
    )
    return emit(options, result, lambda: show_next(options.out))
