"""What the verbs that train do behind their own checks: the last checks before torch, the plan or the run, its end."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from metatokens.cli.output import announce, emit


def train_or_plan(
    options: argparse.Namespace,
    config: Any,
    out: Path,
    train: str,
    *,
    titles: tuple[str, str],
    following: Sequence[Any],
) -> int:
    """Train into the run folder `out`, or say what that would do, and return the exit code.

    Args:
        options: of the command, with those of `arguments.add_run_options`.
        config: of the run.
        out: its folder.
        train: the function that trains, `module:name`; beside it stands `plan`.
        titles: of the plan and of the result.
        following: words of the next natural command.

    Raises:
        MetaTokensError: of the checks and of the run.
    """
    from metatokens.config.changes import check_allowed
    from metatokens.report.console import show_table
    from metatokens.storage import check_folder

    check_allowed(options.allow_change, type(config))
    if options.resume is not None:
        from metatokens.training.checkpoint import check_checkpoint

        check_checkpoint(options.resume)
    check_folder(out)
    announce(options, f"preparing {options.preset}")
    from metatokens.training.distributed import is_main_process

    module, _, name = train.partition(":")
    verbs = import_module(module)
    continuing = {"resume": options.resume, "allow_change": options.allow_change}
    if options.dry_run:
        rows = {"out": str(out), **verbs.plan(config, out, **continuing)}
        return emit(options, rows, lambda: show_table(titles[0], rows))
    result = getattr(verbs, name)(config, out, stop_after=options.stop_after, **continuing)
    if not is_main_process():
        return 0
    return emit(options, result, lambda: show_table(titles[1], asdict(result)), following=following)
