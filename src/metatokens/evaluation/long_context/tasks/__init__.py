"""The tasks, one function and one file each; a new file is named in `MODULES`."""

from importlib import import_module

from metatokens.evaluation.long_context.cases import TASKS, Case, find_task

__all__ = ["TASKS", "Case", "find_task"]

MODULES = ("needle", "multi_key", "multi_value", "variables", "passkey", "copying", "babilong")
for _name in MODULES:
    import_module(f"{__name__}.{_name}")
