"""The command line: parse, dispatch, exit code, error text. Each verb has a file; the work is done elsewhere.

Every verb takes `--json` (the result alone on standard output); verbs that work long take `--dry-run`. Every error is
one line on standard error and the exit code of `metatokens.errors`; `--debug` shows the traceback. A verb's file
imports heavy packages only when the verb runs, so `metatokens --help` does not import torch.
"""

import argparse
import resource
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from metatokens.cli import (
    adopt,
    analyze,
    bench,
    compress,
    demo,
    evaluate,
    export,
    extend,
    finetune,
    generate,
    graft,
    info,
    perplexity,
    plan,
    prepare,
    pretrain,
    replicate,
    report,
    serve,
    sweep,
    verify,
)
from metatokens.cli.arguments import Parser, Verb
from metatokens.cli.completion import SHELLS, PrintCompletion
from metatokens.cli.output import say
from metatokens.errors import FULL_DISK, MetaTokensError, Preempted, ResourceError, UsageError
from metatokens.names import nearest_name

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024

# in the order of the help
VERBS = (
    *(demo, prepare, adopt, pretrain, extend, finetune, graft, evaluate, sweep, replicate, perplexity),
    *(analyze, report, generate, compress, serve, export, verify, info, plan),
    bench,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            options = _parse([argument for argument in arguments if argument != "--debug"])
            verb: Verb = options.verb
            return verb(options)
    except (MetaTokensError, Preempted) as error:
        if debug:
            raise
        if not error.is_repeated:
            say(f"metatokens: {error}")
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        say("metatokens: interrupted")
        return 130
    except Exception as error:  # the top level turns every error into one line
        if debug:
            raise
        if isinstance(error, OSError) and (error.filename or error.errno in FULL_DISK):
            return _end_of_path(error)
        # of torch's errors without an import of torch; that of the CPU has no type of its own
        of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        out_of_memory = isinstance(error, MemoryError) or of_torch
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "lower training.micro_batch_blocks or take a smaller model" if out_of_memory else "--debug shows where"
        say(f"metatokens: {cause}; {_peaks() if out_of_memory else ''}{remedy}")
        return ResourceError.exit_code if out_of_memory else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="metatokens", description="Language models with learned meta-tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metatokens {version('metatokens')}")
    parser.add_argument(
        "--print-completion", choices=SHELLS, action=PrintCompletion, help="print the completion script of a shell"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    options: argparse.Namespace
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        remedy = nearest_name(overrides[0].partition("=")[0], options.flags) or f"see `metatokens {arguments[0]} -h`"
        found = f"unrecognized arguments: {' '.join(overrides)}"
        raise UsageError("command line", expected="valid arguments", found=found, remedy=remedy)
    options.overrides = overrides
    return options


def _peaks() -> str:
    """Tell the most memory that was in use."""
    held = f"at the peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / 2**30:.1f} GiB were held"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return f"{held}; "
    return f"{held}, and {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU; "


def _end_of_path(error: OSError) -> int:
    """Say in one line which path could not be used, if no check has said more, and return the exit code."""
    kind = ResourceError if error.errno in FULL_DISK else UsageError
    what, found = error.filename or "a file", error.strerror or str(error)
    line = kind(str(what), expected="a path that can be used", found=found, remedy="--debug shows where")
    say(f"metatokens: {line}")
    return kind.exit_code


def _show_warning(message: Warning | str, *details: Any) -> None:
    del details
    say(f"metatokens: warning: {' '.join(str(message).split())}")
