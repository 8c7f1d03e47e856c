"""`metatokens verify`: compare the files of any folder of this package with their digests."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import announce, emit, say


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "compare every file of a run, checkpoint, model, tokens, analysis or sweep with its digest"
    parser = add_verb(verbs, "verify", _run, text)
    parser.add_argument("folder", type=Path, help="the folder, or one that holds several")


def _run(options: argparse.Namespace) -> int:
    from metatokens.report.console import show_table
    from metatokens.verification import check_folder_exists, verify_folder

    check_folder_exists(options.folder)
    announce(options, f"verifying {options.folder}")
    found = verify_folder(options.folder)
    for problem in found.problems:
        say(f"metatokens: {problem}")
    for path in found.not_sealed:
        say(f"metatokens: warning: {path}: no digest to compare with")
    shared = {"folder": found.folder, "kind": found.kind, "files_verified": found.files}
    result = {**shared, "problems": [str(one) for one in found.problems], "not_sealed": found.not_sealed}
    rows = {**shared, "problems": len(found.problems), "not_sealed": len(found.not_sealed)}
    emit(options, result, lambda: show_table("verified", rows))
    return found.problems[0].exit_code if found.problems else 0
