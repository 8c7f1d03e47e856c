"""`metatokens compress`: read a document once, and keep what memory mode keeps of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import announce, emit
from metatokens.cli.schedules import add_schedule, schedule_of
from metatokens.errors import DataError


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "read a document with a model in memory mode, for many calls of `generate --memory`"
    parser = add_verb(verbs, "compress", _run, text)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder of a model in memory mode")
    parser.add_argument("document", help="text file in UTF-8; - reads standard input")
    parser.add_argument("--out", type=Path, required=True, help="file of the compressed document, .safetensors")
    add_schedule(parser)


def _run(options: argparse.Namespace) -> int:
    from metatokens.storage import check_file
    from metatokens.training.loading import ModelFolder

    folder = ModelFolder(options.checkpoint)
    folder.check_path()
    text = _read(options.document)
    check_file(options.out)
    announce(options, f"opening {options.checkpoint}")
    from metatokens.generation.compressed import compress_document
    from metatokens.report.console import show_table

    model = folder.open_model()
    schedule = schedule_of(options, model.generation_config)
    document = compress_document(model, folder.tokenizer, text, schedule=schedule)
    document.save(options.out)
    result = {
        "text_tokens": document.read.num_text,
        "meta_tokens": document.read.num_meta,
        "cache_bytes": document.num_bytes,
        "full_cache_bytes": document.num_bytes_of_all(model.config),
        "out": str(options.out),
    }
    following = ("metatokens", "generate", options.checkpoint, "In short,", "--memory", options.out)
    return emit(options, result, lambda: show_table("compressed", result), following=following)


def _read(document: str) -> str:
    if document == "-":
        return sys.stdin.read()
    try:
        return Path(document).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            document, expected="a text file in UTF-8", found=found, remedy="name a text file, or - for standard input"
        ) from None
