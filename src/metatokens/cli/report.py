"""`metatokens report`: render an analysis."""

import argparse
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb
from metatokens.cli.output import announce, emit


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "report", _run, "render an analysis as an HTML page and as figures for papers")
    parser.add_argument("results", type=Path, help="folder that `analyze` wrote")
    parser.add_argument(
        "--out", type=Path, help="folder of the page and the figures (default: the folder of the results)"
    )


def _run(options: argparse.Namespace) -> int:
    from metatokens.analysis.results import read_results
    from metatokens.report import require_packages

    require_packages("report")
    read_results(options.results)  # refuses a wrong path before the slow imports
    announce(options, f"drawing {options.results}")
    from metatokens.report.page import PAGE_NAME, write_report
    from metatokens.storage import check_file

    check_file((options.out or options.results) / PAGE_NAME)
    page = write_report(options.results, options.out)
    return emit(options, {"page": str(page)}, lambda: print(page), following=("python", "-m", "webbrowser", page))
