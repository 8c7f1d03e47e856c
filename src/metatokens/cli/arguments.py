"""What the parsers of all verbs share: flags, types of numbers, overrides of config fields.

Numbers are checked here, before anything is loaded. Config classes are imported only to show their help.
"""

import argparse
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from metatokens.errors import UsageError
from metatokens.names import nearest_name

Verb = Callable[[argparse.Namespace], int]
"""Does the work of a command and returns its exit code."""

INTERVENTIONS = {
    "zero_embedding": "zero_embedding",
    "mean_embedding": "mean_embedding",
    "token_embedding": "token_embedding=ID",
    "zero_position": "zero_position",
    "no_position_edges": "no_position_edges",
    "no_meta_attention": "no_meta_attention[=LAYER,LAYER...]",
}
"""The kinds of `metatokens.evaluation.interventions`, which imports torch, and how each is written."""
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_LONGEST_SECONDS = 10 * 366 * 24 * 3600
MOST_NAMED = 12
"""Choices that an error names one by one, where it also asks for the nearest."""
_SAME_FLAG = 0.85  # --dryrun and --dry-run have 0.94; no field of a config is that similar to a flag


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whose paths may begin with ~, and whose numbers are finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Let arguments of type Path and float be read by `path` and `finite_number`."""
        super().__init__(*args, **kwargs)
        self.register("type", Path, path)
        self.register("type", float, finite_number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with - and _ alike in the names of flags."""
        return super().parse_known_args(_as_declared(args or [], self._option_string_actions), namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            # a UsageError is a ValueError, which argparse takes for a value of the wrong type
            if isinstance(error.__context__, UsageError):
                raise error.__context__ from None
            raise

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            UsageError: always.
        """
        raise UsageError("command line", expected="valid arguments", found=message, remedy=f"see `{self.prog} -h`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a verb or a value that is none of the choices, and ask for the nearest one."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            where, remedy = argparse._get_action_name(action) or "command line", nearest_name(str(value), choices)
            # with many choices the nearest one is the answer, and all of them would hide it
            is_long = bool(remedy) and len(choices) > MOST_NAMED
            expected = f"one of {len(choices)} names" if is_long else f"one of {', '.join(choices)}"
            remedy += f" `{self.prog} -h` has all of them" if is_long else ""
            remedy = remedy or f"see `{self.prog} -h`"
            raise UsageError(where, expected=expected, found=repr(value), remedy=remedy)


def add_verb(verbs: Any, name: str, verb: Verb, text: str, *, long: bool = False) -> argparse.ArgumentParser:
    """Add a verb with the flags that every verb has, and return its parser; a `long` verb has a dry run."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(verb=verb, takes_overrides=False, flags=parser._option_string_actions)
    parser.add_argument("--json", action="store_true", help="write the result as JSON, alone on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if long:
        parser.add_argument("--dry-run", action="store_true", help="check everything and show what would be done")
    return parser


def add_overrides(parser: argparse.ArgumentParser, schema: str, others: Mapping[str, str] | None = None) -> None:
    """Let a verb take the fields of a config class, `module:name`, as overrides, and list them in its help.

    Args:
        parser: of the verb.
        schema: the class.
        others: other classes, each by the argument that puts it in the place of `schema`.
    """
    own_arguments, given = parser.parse_known_args, []

    def parse_known_args(arguments: Any = None, namespace: Any = None) -> Any:
        given.extend(arguments)
        flags = parser._option_string_actions
        # argparse would take the value of an override for an argument of the verb
        rest, overrides = _split_overrides(_as_declared(arguments, flags), flags)
        options, unknown = own_arguments(rest, namespace)
        return options, [*unknown, *overrides]

    def format_help() -> str:
        from metatokens.config.fields import HELP_WIDTH, format_fields

        chosen = (other for argument, other in (others or {}).items() if argument in given)
        module, name = next(chosen, schema).split(":")
        config_class = getattr(import_module(module), name)
        origin, tree = _preset_among(given, config_class)
        title = (
            f"Fields, each an override `--section.key VALUE` (YAML values, off = none), with the values of {origin}:"
        )
        title = textwrap.fill(title, HELP_WIDTH)
        return f"{argparse.ArgumentParser.format_help(parser)}\n{title}\n\n{format_fields(config_class, tree)}\n"

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
    parser.set_defaults(takes_overrides=True)
    parser.formatter_class = argparse.HelpFormatter
    parser.format_help = format_help  # type: ignore[method-assign]


def _preset_among(arguments: Sequence[str], schema: Any) -> tuple[str, dict[str, Any]]:
    """Return the first argument that names a preset of the schema, and its values; without one, the defaults."""
    from metatokens.config.loading import load_preset

    for argument in arguments:
        with suppress(UsageError, ValueError):
            return argument, load_preset(argument, schema=schema).model_dump(mode="json")
    return "the defaults", {}


def _as_declared(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return the arguments with each flag as it was declared, where one was written with _ for - or the reverse."""
    declared = {flag.replace("_", "-"): flag for flag in flags}
    options = list(takewhile(lambda argument: argument != "--", arguments))
    written = []
    for argument in options:
        name, *value = argument.split("=", 1) if argument.startswith("--") else [argument]
        written.append("=".join([declared.get(name.replace("_", "-"), name), *value]))
    return [*written, *arguments[len(options) :]]


def _split_overrides(arguments: list[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a verb into its own and the overrides with their values, wherever they stand.

    Raises:
        UsageError: a flag is almost spelt right; as an override it would take the next argument for its value.
    """
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if not argument.startswith("--") or name in flags or argument == "--":
            rest.append(argument)
            continue
        if close := difflib.get_close_matches(name, flags, n=1, cutoff=_SAME_FLAG):
            raise UsageError("command line", expected="a flag", found=name, remedy=f"did you mean {close[0]!r}?")
        overrides.append(argument)
        if not equals:
            overrides += [value for value in [next(remaining, None)] if value is not None]
    return rest, overrides


def add_run(parser: argparse.ArgumentParser, schema: str) -> None:
    """Add the arguments of a verb that trains a preset."""
    parser.add_argument("preset", help="name of a preset (see `metatokens info --presets`) or a YAML file")
    add_run_options(parser, schema)


def add_run_options(parser: argparse.ArgumentParser, schema: str) -> None:
    """Add the flags of a verb that trains, but for the preset."""
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET, or for a file runs/ and its name)")
    add_stop_after(parser)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="continue from this checkpoint and from no other (default: the newest of the run folder that is whole)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        metavar="KEY",
        default=[],
        help="a key of the schedule that may differ from the run's, such as optimizer.learning_rate; repeat the flag",
    )
    add_overrides(parser, schema)


def add_stop_after(parser: argparse.ArgumentParser) -> None:
    """Add the flag that ends a training in time."""
    parser.add_argument(
        "--stop-after",
        type=duration,
        metavar="TIME",
        help="save and end after this time, such as 3h50m, with exit code 75; the same command continues",
    )


def run_folder(options: argparse.Namespace) -> Path:
    """Return the run folder of a verb that trains a preset; tiny/meta and small/meta have different ones."""
    from metatokens.config.loading import YAML_SUFFIXES

    preset = Path(options.preset)
    out: Path = options.out or Path("runs") / (preset.stem if preset.suffix in YAML_SUFFIXES else preset)
    return out


def add_interventions(parser: argparse.ArgumentParser) -> None:
    """Add the flag for interventions at the meta-tokens."""
    parser.add_argument(
        "--intervention",
        action="append",
        type=_intervention,
        metavar="KIND",
        default=[],
        help="a change at the meta-tokens; repeat the flag to combine several: " + ", ".join(INTERVENTIONS.values()),
    )


def _intervention(text: str) -> str:
    """Refuse an unknown kind before the slow imports; its argument is read by `parse_intervention`."""
    kind = text.partition("=")[0]
    if kind not in INTERVENTIONS:
        remedy = nearest_name(kind, INTERVENTIONS) or "name one of them"
        expected = f"one of {', '.join(INTERVENTIONS.values())}"
        raise UsageError("intervention", expected=expected, found=repr(text), remedy=remedy)
    return text


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number, such as 1000 or 1e3, of at least `least`."""

    def whole_number(text: str) -> int:
        try:
            number = Decimal(text)
        except InvalidOperation:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (number.is_finite() and least <= number < 2**63 and number == int(number)):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least} and less than 2^63")
        return int(number)

    return whole_number


def share(text: str) -> float:
    """Read an argument that is a share in [0, 1)."""
    if not 0 <= finite_number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and less than 1")
    return float(text)


def duration(text: str) -> float:
    """Read an argument that is a duration, such as 3h50m, 90s or 1d12h; return its seconds."""
    parts = _DURATION.fullmatch(text)
    if parts is None or not any(parts.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 3h50m or 90s")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    whole = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if whole > _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is more than ten years")
    return float(whole)


def finite_number(text: str) -> float:
    """Read an argument that is a number."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def path(text: str) -> Path:
    """Read an argument that is a path; a shell does not expand the ~ in --out=~/run."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # there is no such user
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
