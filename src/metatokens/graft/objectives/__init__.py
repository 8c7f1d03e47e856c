"""What the new parts of a graft learn from.

An objective is one function in one file beside this one, named in `MODULES` below, and its weight is a field of the
same name in `metatokens.config.grafting.Objectives`.

    distillation     the predictions of the same model under full attention
    language_model   the next token of the text
    needles          the answers to questions about what is gone
"""

from importlib import import_module

from metatokens.graft.objectives.objective import OBJECTIVES, Objective, Pass, objective

__all__ = ["OBJECTIVES", "Objective", "Pass", "objective"]

MODULES = ("distillation", "language_model", "needles")
for _name in MODULES:
    import_module(f"{__name__}.{_name}")
