"""`metatokens --print-completion SHELL`: a script that completes verbs, flags, choices, presets and paths.

It is made from the parsers, so the next verb is completed without a line here.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metatokens.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")
_PRESET_FUNCTION = "_metatokens_presets"


class PrintCompletion(argparse.Action):
    """Prints the script and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Print the script of the shell `values`.

        Raises:
            UsageError: the package shtab, which writes it, is not installed.
        """
        del namespace, option_string
        print(completion_script(parser, values))
        raise SystemExit(0)


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser."""
    try:
        import shtab
    except ImportError:
        raise UsageError(
            "--print-completion",
            expected="the package shtab",
            found="not installed",
            remedy="pip install 'metatokens[completion]'",
        ) from None
    from metatokens.config.loading import preset_names

    presets = {"bash": _PRESET_FUNCTION, "zsh": f"({' '.join(preset_names())})"}
    for action in _all_actions(parser):
        if action.dest == "preset":
            action.complete = presets  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    words = " ".join(preset_names())
    function = f'{_PRESET_FUNCTION}() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}'
    script: str = shtab.complete(parser, shell=shell, preamble=function if shell == "bash" else "")
    return script


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _all_actions(verb)
