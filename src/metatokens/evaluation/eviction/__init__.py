"""Caches that forget, as baselines: which columns of the past a decoder of transformers still sees.

A policy is one function in one file beside this one, named in `MODULES` below. It says what a query sees; the rest
follows: `Reader` reads a text in chunks and, after each forward pass, really drops the columns that the newest query
does not see. Positions stay those of the text. These are the policies without training:

    full        everything, in the model's own cache
    window      the newest columns
    sinks       the first few columns and the newest (StreamingLLM: Xiao et al. 2024)
    every       these, and every n-th column in between
    separators  these, and the newest ends of clauses in between (SepLLM: Chen et al. 2025)
    pooled      these, and the mean key and value of each n columns in between
"""

from importlib import import_module

from metatokens.evaluation.eviction.policies import POLICIES, Budget, Policy
from metatokens.evaluation.eviction.reading import Reader

__all__ = ["POLICIES", "Budget", "Policy", "Reader"]

MODULES = ("full", "window", "sinks", "every", "separators", "pooled")
for _name in MODULES:
    import_module(f"{__name__}.{_name}")
