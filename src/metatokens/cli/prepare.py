"""`metatokens prepare`: turn text into verified shards."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatokens.cli.arguments import add_verb, at_least, share
from metatokens.cli.output import emit
from metatokens.cli.reading import SOURCE_HELP, Progress, add_source_options, source_options

if TYPE_CHECKING:
    from metatokens.data.shards import Manifest


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "prepare", _run, "tokenise text into verified shards", long=True)
    parser.add_argument("source", nargs="?", default="python-docs", help=SOURCE_HELP)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", help="folder, tokenizer.json or hub id (default: train one on the source)")
    parser.add_argument(
        "--vocab-size", type=at_least(257), default=4096, help="tokens of a tokenizer that is trained on the source"
    )
    parser.add_argument(
        "--validation-fraction", type=share, default=0.02, help="share of documents kept out of training"
    )
    parser.add_argument(
        "--shard-tokens", type=at_least(1), default=2**28, help="approximate number of tokens in a shard"
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        help="processes that tokenise; with 1 the command does it itself, with a thread for each core",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait for another process that writes the folder; what it finishes of the same source is the result",
    )
    add_source_options(parser)


def _run(options: argparse.Namespace) -> int:
    from metatokens.data.prepare import check, prepare
    from metatokens.data.source_files import survey_source
    from metatokens.data.splits import split_rule
    from metatokens.report.console import show_table
    from metatokens.training.signals import collect_stop_signals

    arguments = {
        "tokenizer": options.tokenizer,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
        "options": source_options(options),
    }
    if options.dry_run:
        check(options.source, options.out, **arguments, may_be_finished=options.wait)
        found = survey_source(options.source)
        plan = {
            "source": options.source,
            "files": len(found.files),
            "bytes_on_disk": sum(file.stat().st_size for file in found.files),
            "left_out": list(found.left_out),
            "tokenizer": options.tokenizer or f"trained here, {options.vocab_size} tokens",
            "split": split_rule(options.source, options.validation_fraction),
            "out": str(options.out),
        }
        return emit(options, plan, lambda: show_table("prepare would read", plan))
    progress, total = Progress(), _text_bytes(survey_source(options.source).files, options)
    try:
        # a kill would lose no finished shard either, but a scheduler learns from the exit code that there is more to do
        with collect_stop_signals() as stop, stop.at_once():
            manifest = prepare(
                options.source,
                options.out,
                **arguments,
                vocab_size=options.vocab_size,
                jobs=options.jobs,
                wait=options.wait,
                progress=lambda done, num_tokens: progress.show(
                    f"{done / 1e6:,.1f} MB, {num_tokens:,} tokens", min(done / total, 1) if total else None
                ),
                say=progress.say,
            )
    finally:
        progress.close()
    result = summary_of(options.out, manifest)
    following = ("metatokens", "pretrain", "tiny/meta", "--data.path", options.out)
    return emit(options, result, lambda: show_table("prepared", result), following=following)


def summary_of(out: Path, manifest: "Manifest") -> dict[str, Any]:
    """Return what a person is told of a new dataset."""
    splits = ("train", "validation")
    tokens = {split: sum(shard.num_tokens for shard in manifest.shards if shard.split == split) for split in splits}
    documents = {split: sum(s.num_documents for s in manifest.shards if s.split == split) for split in splits}
    return {
        "out": str(out),
        "vocab_size": manifest.vocab_size,
        **{f"{split}_tokens": count for split, count in tokens.items()},
        **{f"{split}_documents": count for split, count in documents.items()},
        "documents_skipped": manifest.num_documents_skipped,
        "content_id": manifest.content_id,
    }


def _text_bytes(files: Sequence[Path], options: argparse.Namespace) -> int | None:
    """Return the bytes of text in files that hold nothing else; None if their text is not known before reading."""
    if options.max_documents is not None or not files or any(file.suffix != ".txt" for file in files):
        return None
    return sum(file.stat().st_size for file in files)
