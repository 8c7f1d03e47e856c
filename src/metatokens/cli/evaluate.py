"""`metatokens evaluate`: accuracy on a recall task, or the long-context suite."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_interventions, add_overrides, add_verb
from metatokens.cli.output import announce, emit
from metatokens.cli.reading import Progress
from metatokens.errors import CheckpointError, UsageError

LONG_CONTEXT = "long-context"


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "accuracy on a recall task by length and intervention, or on long contexts by cache, with intervals"
    parser = add_verb(verbs, "evaluate", _run, text, long=True)
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="model, checkpoint or run folders; several count as seeds of one arm"
    )
    parser.add_argument(
        "--suite",
        choices=("recall", LONG_CONTEXT),
        default="recall",
        help="recall: the task that the model was trained on, or --task.kind; long-context: needles, BABILong and "
        "others for any causal language model of transformers, also a .gguf file, under caches that forget",
    )
    add_interventions(parser)
    parser.add_argument("--out", type=Path, help="file that also gets the result as JSON")
    add_overrides(
        parser,
        "metatokens.config.finetuning:EvaluateConfig",
        {LONG_CONTEXT: "metatokens.config.long_context:LongContextConfig"},
    )


def _run(options: argparse.Namespace) -> int:
    return _run_long_context(options) if options.suite == LONG_CONTEXT else _run_recall(options)


def _run_recall(options: argparse.Namespace) -> int:
    from metatokens.report.console import show_recall, show_table
    from metatokens.storage import check_file
    from metatokens.training.loading import ModelFolder, check_one_arm, evaluation_config_of

    folders = [ModelFolder(path) for path in options.checkpoints]
    for folder in folders:
        folder.check_path()
        folder.refuse_graft("a recall task")
    check_one_arm(folders)
    config = evaluation_config_of(folders[0], options.overrides)
    if options.out:
        check_file(options.out)
    announce(options, f"opening {options.checkpoints[0]}")
    from metatokens.data.tokenizer import TextEncoder
    from metatokens.evaluation.interventions import check_interventions, parse_intervention
    from metatokens.evaluation.recall import evaluate_recall, report
    from metatokens.tasks.base import PieceEncoder
    from metatokens.training.distributed import choose_device

    interventions = tuple(parse_intervention(text) for text in options.intervention)
    model = folders[0].open_model()
    check_interventions(model, interventions)
    device = choose_device(config.device)
    if options.dry_run:
        plan = {"models": len(options.checkpoints), **config.model_dump(mode="json")}
        return emit(options, plan, lambda: show_table("evaluate would measure", plan))
    progress, done, total = Progress(), count(1), len(folders) * len(config.lengths)
    rows = evaluate_recall(
        (folder.open_model().to(device) for folder in folders),
        config,
        PieceEncoder(TextEncoder(folders[0].tokenizer)),
        interventions=interventions,
        progress=lambda line: progress.show(line, next(done) / total),
    )
    progress.close()
    result = report(rows, config, [str(path) for path in options.checkpoints], model)
    try:
        _write(options.out, result)
    finally:
        text = () if folders[0].finetuning else ("--text", "python-docs")
        following = ("metatokens", "analyze", options.checkpoints[0], *text, "--out", "analysis")
        emit(options, result, lambda: show_recall(result), following=following)
    return 0


def _run_long_context(options: argparse.Namespace) -> int:
    from metatokens.config.loading import override
    from metatokens.config.long_context import LongContextConfig
    from metatokens.evaluation.long_context.tasks import find_task
    from metatokens.report.console import show_long_context, show_table
    from metatokens.storage import check_file

    path, *others = options.checkpoints
    if others or options.intervention:
        raise UsageError(
            "--suite long-context",
            expected="one model, and no --intervention",
            found=f"{others[0]} too" if others else options.intervention[0],
            remedy="evaluate models one by one" if others else "leave it out",
        )
    config = override(LongContextConfig(), options.overrides, origin="evaluate --suite long-context")
    open_subject = _opener(path)
    for task in config.tasks:
        find_task(task)
    for source in (config.books, config.babi):
        if source is not None and not source.exists():
            raise UsageError(
                str(source), expected="a file or folder", found="no such path", remedy="check the spelling"
            )
    if options.out:
        check_file(options.out)
    announce(options, f"opening {path}")
    from metatokens.evaluation.long_context.suite import check_suite, evaluate_long_context
    from metatokens.training.distributed import choose_device

    subject = open_subject(choose_device(config.device), config.dtype)
    check_suite(subject, config)
    if options.dry_run:
        plan = {"texts": len(config.tasks) * len(config.lengths) * config.instances, **config.model_dump(mode="json")}
        return emit(options, plan, lambda: show_table("evaluate would measure", plan))
    progress = Progress()
    try:
        result = evaluate_long_context(subject, config, name=str(path), progress=progress.show)
    finally:
        progress.close()
    try:
        _write(options.out, result)
    finally:
        emit(options, result, lambda: show_long_context(result))
    return 0


def _opener(path: Path) -> Callable[[Any, str], Any]:
    """Check the path of a model and return what opens it on a device, in a dtype, as a `Subject`."""
    from metatokens.training.loading import ModelFolder

    is_gguf = path.suffix == ".gguf"
    folder = ModelFolder(path)
    if not is_gguf:
        folder.check_path()
    elif not path.is_file():
        raise CheckpointError(str(path), expected="a GGUF file", found="none", remedy="check the spelling")

    def open_on(device: Any, dtype: str) -> Any:
        import torch

        from metatokens.evaluation.long_context.subject import Subject

        if is_gguf:
            from metatokens.baselines.gguf import load_gguf

            model, tokenizer = load_gguf(path)
            return Subject(model.to(device, getattr(torch, dtype)), tokenizer)
        model = folder.open_model().to(device, getattr(torch, dtype))
        return Subject(model, folder.tokenizer, prefix=folder.prefix_ids)

    return open_on


def _write(path: Path | None, result: Any) -> None:
    from metatokens.storage import keep_elsewhere, to_json, write_atomically

    if path:
        written = to_json(asdict(result), indent=1) + "\n"
        keep_elsewhere(path, lambda path: write_atomically(path.resolve(), written))
