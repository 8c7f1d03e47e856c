"""`metatokens generate`: continue a prompt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit, say
from metatokens.cli.schedules import add_schedule, schedule_of
from metatokens.errors import printable


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "generate", _run, "continue a prompt, with meta-tokens on a schedule")
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument("prompt", nargs="?", default="-", help="text to continue; - reads standard input")
    parser.add_argument(
        "--max-text-tokens", type=at_least(1), help="most text tokens to write (100, or as many as the window holds)"
    )
    add_schedule(parser)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this probability")
    parser.add_argument("--memory", type=Path, help="file of `metatokens compress`, which the prompt follows")
    parser.add_argument("--show-meta", action="store_true", help="show meta-tokens in the text")


def _run(options: argparse.Namespace) -> int:
    from metatokens.training.loading import ModelFolder

    folder = ModelFolder(options.checkpoint)
    folder.check_path()
    announce(options, f"opening {options.checkpoint}")
    from metatokens.generation.compressed import CompressedDocument
    from metatokens.generation.decoding import generate_text

    memory = None if options.memory is None else CompressedDocument.load(options.memory)
    model, tokenizer = folder.open_model(), folder.tokenizer
    schedule = schedule_of(options, model.generation_config)
    if memory is not None and (options.schedule, options.every, options.ratio) == (None, None, None):
        schedule = memory.schedule
    if options.prompt == "-" and sys.stdin.isatty():
        say("reading the prompt from standard input; press Ctrl-D on an empty line to end it")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    unshown = iter([prompt])  # shown with the first piece, when all checks have passed
    stream = None if options.json else lambda text: _show(next(unshown, "") + text, end="")
    result = generate_text(
        model,
        tokenizer,
        prompt,
        schedule=schedule,
        max_text_tokens=options.max_text_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stream=stream,
        show_meta=options.show_meta,
        memory=memory,
    )
    # a prompt from standard input cannot be typed again
    following = None if options.prompt == "-" else _without_meta_tokens(options, schedule)
    return emit(options, result, lambda: _show(next(unshown, "")), following=following)


def _show(text: str, end: str = "\n") -> None:
    """Print text to a terminal without what would command it, elsewhere as it is."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def _without_meta_tokens(options: argparse.Namespace, schedule: Any) -> Sequence[object]:
    if options.memory is not None:
        return ("metatokens", "generate", options.checkpoint, options.prompt)
    if schedule.kind == "none":
        return ("metatokens", "info", options.checkpoint)
    return ("metatokens", "generate", options.checkpoint, options.prompt, "--schedule", "none")
