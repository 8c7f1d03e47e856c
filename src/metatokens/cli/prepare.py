"""`metatokens prepare`: text into verified shards."""

import argparse
import sys
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least, share
from metatokens.cli.output import emit
from metatokens.report.console import show_table


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "prepare", _run, "tokenise text into verified shards", long=True)
    parser.add_argument(
        "source",
        nargs="?",
        default="python-docs",
        help="a .txt, .jsonl or .parquet file (.gz, .zst too), a folder, a dataset id on the hub, or python-docs",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", help="folder, tokenizer.json or hub id; without it one is trained on the source")
    parser.add_argument("--vocab-size", type=at_least(257), default=4096, help="of a tokenizer trained here")
    parser.add_argument(
        "--validation-fraction", type=share, default=0.02, help="share of documents kept out of training"
    )
    parser.add_argument("--shard-tokens", type=at_least(1), default=2**28, help="tokens of a shard, about")
    parser.add_argument(
        "--text-field", default="text", help="column of jsonl, parquet and datasets that holds the text"
    )
    parser.add_argument("--config-name", help="configuration of a Hugging Face dataset, such as en")
    parser.add_argument("--split", default="train", help="split of a Hugging Face dataset")
    parser.add_argument("--max-documents", type=at_least(1), help="stop after so many documents")
    parser.add_argument(
        "--on-bad-text", choices=("error", "replace", "skip"), default="error", help="for text that is not valid UTF-8"
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.data.prepare import check, prepare
    from metatokens.data.sources import SourceOptions, source_files

    source_options = SourceOptions(
        text_field=options.text_field,
        config_name=options.config_name,
        split=options.split,
        on_bad_text=options.on_bad_text,
        max_documents=options.max_documents,
    )
    arguments = {
        "tokenizer": options.tokenizer,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
    }
    if options.dry_run:
        check(options.source, options.out, **arguments)
        files = source_files(options.source)
        plan = {
            "source": options.source,
            "files": len(files),
            "bytes_on_disk": sum(file.stat().st_size for file in files),
            "tokenizer": options.tokenizer or f"trained here, {options.vocab_size} tokens",
            "out": str(options.out),
        }
        return emit(options, plan, lambda: show_table("prepare would read", plan))
    manifest = prepare(
        options.source,
        options.out,
        **arguments,
        vocab_size=options.vocab_size,
        options=source_options,
        progress=_show_bytes if sys.stderr.isatty() else None,
    )
    splits = ("train", "validation")
    tokens = {split: sum(shard.num_tokens for shard in manifest.shards if shard.split == split) for split in splits}
    documents = {split: sum(s.num_documents for s in manifest.shards if s.split == split) for split in splits}
    result = {
        "out": str(options.out),
        "vocab_size": manifest.vocab_size,
        **{f"{split}_tokens": count for split, count in tokens.items()},
        **{f"{split}_documents": count for split, count in documents.items()},
        "documents_skipped": manifest.num_documents_skipped,
        "content_id": manifest.content_id,
    }
    return emit(options, result, lambda: show_table("prepared", result))


def _show_bytes(num_bytes: int, num_tokens: int) -> None:
    print(f"\r{num_bytes / 1e6:,.1f} MB, {num_tokens:,} tokens", end="", file=sys.stderr, flush=True)
