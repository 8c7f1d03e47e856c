"""`metatokens bench`: speed side by side, all contenders of a question in one run."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metatokens.cli.arguments import add_overrides, add_verb
from metatokens.cli.output import announce, emit, say


class Question(NamedTuple):
    """One thing that can be asked: `metatokens.bench.NAME`, with settings `metatokens.config.bench.SETTINGS`."""

    settings: str
    text: str
    draws: bool = True
    """Whether there is a picture of times."""


QUESTIONS = {
    "training": Question("TrainingBench", "a training step, decoder alone and whole: ours, plain, others' packages"),
    "memory": Question(
        "MemoryBench", "the peak memory of a training step, each contender in a process of its own", draws=False
    ),
    "generation": Question(
        "GenerationBench", "first token and decoding: ours by both loops, plain, transformers' GPT-2"
    ),
    "long": Question(
        "LongBench", "decoding behind a long text, and the memory to read it: memory mode and full attention"
    ),
    "data": Question("DataBench", "tokenising, prepare, injection and the loader"),
    "analysis": Question("AnalysisBench", "statistics of attention rows, beside the forward pass alone"),
}


def add(verbs: Any) -> None:
    """Add the verb and a parser for each question."""
    text = "speed side by side: ours with and without meta-tokens, and what others would take"
    parser = verbs.add_parser("bench", help=text, description=text, allow_abbrev=False)
    questions = parser.add_subparsers(metavar="QUESTION", required=True)
    for name, question in QUESTIONS.items():
        one = add_verb(questions, name, partial(_run, name, question), question.text, long=True)
        one.add_argument("--out", type=Path, help="JSON of the result, with the seconds of each round")
        if question.draws:
            one.add_argument("--plot", type=Path, help="picture of the result, such as bench.png")
        add_overrides(one, f"metatokens.config.bench:{question.settings}")


def _run(name: str, question: Question, options: argparse.Namespace) -> int:
    from metatokens.config import bench as config
    from metatokens.config.loading import override
    from metatokens.report import require_packages
    from metatokens.storage import check_file

    settings = override(getattr(config, question.settings)(), options.overrides, origin=f"bench {name}")
    plot = options.plot if question.draws else None
    for path in (options.out, plot):
        if path is not None:
            check_file(path)
    if plot:
        require_packages(f"the plot {plot}")
    announce(options, f"bench {name}")
    from importlib import import_module

    module = import_module(f"metatokens.bench.{name}")
    if options.dry_run:
        chosen, not_run = module.REGISTRY.choose(settings.contenders)
        plan = {
            "question": name,
            "settings": settings.model_dump(mode="json"),
            "contenders": {one: module.REGISTRY.describe(one) for one in chosen},
            "not_run": not_run,
        }
        return emit(options, plan, partial(_show_plan, plan))
    from metatokens.bench.measuring import quiet
    from metatokens.bench.showing import draw, plain_tree, show, write_json

    result = module.run(settings, quiet if options.json else say)
    if options.out:
        write_json(result, options.out)
    if plot:
        draw(result, plot)
    return emit(options, plain_tree(result), partial(show, result))


def _show_plan(plan: dict[str, Any]) -> None:
    from metatokens.report.console import show_table

    show_table(f"bench {plan['question']} would measure", plan["contenders"])
    show_table("not run", plan["not_run"])
    show_table("settings", plan["settings"])
