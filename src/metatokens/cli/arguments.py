"""What the parsers of the verbs have in common: flags, kinds of numbers, overrides of config fields.

A number is checked here, before anything is loaded. Config classes are imported only when their help is asked for.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from metatokens.errors import UsageError

Verb = Callable[[argparse.Namespace], int]
"""Does the work of a command and returns its exit code."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            UsageError: always.
        """
        raise UsageError("command line", expected="valid arguments", found=message, remedy=f"see `{self.prog} -h`")


def add_verb(verbs: Any, name: str, verb: Verb, text: str, *, long: bool = False) -> argparse.ArgumentParser:
    """Add a verb and return its parser, with the flags that every verb has; one that works `long` has a dry run."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(verb=verb, takes_overrides=False)
    parser.add_argument("--json", action="store_true", help="write the result as JSON, alone on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if long:
        parser.add_argument("--dry-run", action="store_true", help="check everything and say what would happen")
    return parser


def add_overrides(parser: argparse.ArgumentParser, schema: str) -> None:
    """Let a verb take the fields of a config class, `module:name`, as overrides, and list them in its help."""

    def format_help() -> str:
        from metatokens.config.loading import describe_fields

        module, name = schema.split(":")
        lines = ["", "fields, each an override `--section.key VALUE` (YAML values, null = off):"]
        for path, default, text in describe_fields(getattr(import_module(module), name)):
            if text:
                lines.append(f"  --{path} [{default}]\n      {text}")
        return argparse.ArgumentParser.format_help(parser) + "\n".join(lines) + "\n"

    parser.set_defaults(takes_overrides=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.format_help = format_help  # type: ignore[method-assign]


def add_run(parser: argparse.ArgumentParser, schema: str) -> None:
    """Add what a verb that trains a preset takes."""
    parser.add_argument("preset", help="name of a preset (see `metatokens info --presets`) or a YAML file")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
    add_overrides(parser, schema)


def add_interventions(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names interventions at the meta-tokens."""
    parser.add_argument(
        "--intervention",
        action="append",
        metavar="KIND",
        default=[],
        help="what is changed at the meta-tokens, several times to combine: zero_embedding, mean_embedding, "
        "token_embedding=ID, zero_position, no_position_edges, no_meta_attention[=LAYER,LAYER...]",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number in a range."""

    def whole_number(text: str) -> int:
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and less than 2^63")
        return int(text)

    return whole_number


def share(text: str) -> float:
    """Read an argument that is a share in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and less than 1")
    return float(text)
