"""Where the numbers of README, docs and experiments come from: committed JSON, and nothing else; see facts.py.

Each module is a topic. Its `NAMES` are functions that return a number or text of one file, and an expression in a
document puts them together; its `TABLES` are functions that write a whole table. A new topic is a new module.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

from measured.recall import ARMS
from measured.source import load, percent, span

TABLES: dict[str, Callable[[], str]] = {}
NAMES: dict[str, Any] = {"load": load, "span": span, "percent": percent, "ARMS": ARMS, "min": min, "max": max}
"""What an expression may use."""
for _found in pkgutil.iter_modules(__path__):
    _topic = import_module(f"measured.{_found.name}")
    TABLES |= getattr(_topic, "TABLES", {})
    NAMES |= {function.__name__: function for function in getattr(_topic, "NAMES", ())}
