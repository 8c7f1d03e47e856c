"""`metatokens adopt`: make verified shards of token files that another package wrote."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import emit
from metatokens.cli.prepare import summary_of
from metatokens.cli.reading import Progress


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "adopt", _run, "make verified shards of token files of other packages", long=True)
    parser.add_argument(
        "files", nargs="+", type=Path, help="token files of nanoGPT, llm.c, Megatron or datatrove, or folders of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; they are links where possible")
    parser.add_argument(
        "--validation", nargs="+", type=Path, default=[], metavar="FILES", help="token files for validation"
    )
    parser.add_argument(
        "--tokenizer", help="folder, tokenizer.json or hub id of the tokenizer (default: the one that the files name)"
    )
    parser.add_argument(
        "--dtype",
        choices=("uint16", "uint32"),
        help="type of the ids in files that do not say it (default: uint16 if the vocabulary fits)",
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.data.adopt import adopt, check_adoption
    from metatokens.report.console import show_table
    from metatokens.training.signals import collect_stop_signals

    arguments = {"validation": options.validation, "tokenizer": options.tokenizer, "dtype": options.dtype}
    if options.dry_run:
        found = check_adoption(options.files, options.out, **arguments)
        plan = {
            "files": [f"{file.path} ({split}, {name})" for split, name, file in found.files],
            "bytes": sum(file.path.stat().st_size for *_, file in found.files),
            "dtype": found.dtype,
            "out": str(options.out),
        }
        return emit(options, plan, lambda: show_table("adopt would read", plan))
    progress = Progress()
    try:
        with collect_stop_signals() as stop, stop.at_once():
            manifest = adopt(
                options.files,
                options.out,
                **arguments,
                progress=lambda done, total: progress.show(f"{done / 1e6:,.1f} MB", done / total),
                say=progress.say,
            )
    finally:
        progress.close()
    result = summary_of(options.out, manifest)
    following = ("metatokens", "pretrain", "tiny/meta", "--data.path", options.out)
    return emit(options, result, lambda: show_table("adopted", result), following=following)
