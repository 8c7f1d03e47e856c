"""`metatokens report`: render an analysis, or several side by side."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import announce, emit
from metatokens.errors import printable


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "report", _run, "render an analysis as an HTML page and as figures for papers")
    parser.add_argument(
        "results", type=Path, nargs="+", help="folder that `analyze` wrote; several are put side by side on one page"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the page and the figures (default: the first folder of results)"
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.analysis.results import read_results
    from metatokens.report import require_packages

    require_packages("report")
    for folder in options.results:
        read_results(folder)  # refuses a wrong path before the slow imports
    announce(options, f"drawing {', '.join(map(str, options.results))}")
    from metatokens.report.comparison import COMPARISON_NAME, write_comparison
    from metatokens.report.page import PAGE_NAME, write_report
    from metatokens.storage import check_file

    first, *others = options.results
    out = options.out or first
    check_file(out / (COMPARISON_NAME if others else PAGE_NAME))
    page = write_comparison(options.results, out) if others else write_report(first, out)
    return emit(
        options,
        {"page": str(page)},
        lambda: print(printable(str(page))),
        following=("python", "-m", "webbrowser", page),
    )
