"""Every pre-named contrast of the sweep, from results.json, with Holm's correction for their number.

This results.json has no accuracy of single seeds, so a p-value can only be approximated from the interval: a normal
estimate whose standard error is the interval's width over 2 x 1.96 (Altman and Bland 2011). The intervals come from a
bootstrap over three seeds and 200 instances and hold the truth in 75% of the cases where the seeds decide. So these
p-values are too small, and the verdict depends on the number of seeds alone. A sweep that runs today stores the seeds,
and its table has the exact tests (`metatokens.report.contrasts`).

    python experiments/tiny-recall/contrasts.py --out experiments/tiny-recall/contrasts.json
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

from metatokens.evaluation.significance import holm, least_units
from metatokens.report.contrasts import LEVEL, MARGIN, contrast_rows, verdict
from metatokens.report.sweep_results import load_results

NORMAL = NormalDist()


def approximate(estimate: float, low: float, high: float) -> tuple[float, float]:
    """Return the p-values of a difference, and of one beyond the margin, that an interval of 95% amounts to."""
    error = (high - low) / (2 * NORMAL.inv_cdf(0.975))
    if not error:
        return float(estimate == 0), float(abs(estimate) >= MARGIN)
    difference = 2 * NORMAL.cdf(-abs(estimate) / error)
    return difference, max(NORMAL.cdf(-(MARGIN + sign * estimate) / error) for sign in (1, -1))


def collect(path: Path) -> list[dict[str, Any]]:
    """Return the contrasts of a results.json."""
    found = []
    for panel, evaluation, arm, row in contrast_rows(load_results(path)):
        difference = row.difference
        assert difference is not None
        assert difference.low is not None
        assert difference.high is not None
        p_value, alike = approximate(difference.estimate, difference.low, difference.high)
        found.append(
            {
                "task": panel,
                "evaluation": evaluation,
                "arm": arm,
                "length": row.length,
                "seeds": len(row.seeds),
                "difference": difference.estimate,
                "bootstrap_low": difference.low,
                "bootstrap_high": difference.high,
                "bootstrap_excludes_zero": not difference.low <= 0 <= difference.high,
                "approximate_p": p_value,
                "approximate_p_alike": alike,
            }
        )
    least = least_units(len(found), LEVEL)
    for name in ("approximate_p", "approximate_p_alike"):
        for one, adjusted in zip(found, holm([one[name] for one in found]).tolist(), strict=True):
            one[f"{name}_holm"] = adjusted
    for one in found:
        # no test over seeds could pass, whatever the intervals say
        one["verdict"] = verdict(one["difference"], 1.0, 1.0, one["seeds"], least)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = collect(options.results)
    report = {
        "command": "python " + " ".join(sys.argv),
        "contrasts": len(found),
        "least_seeds": least_units(len(found), LEVEL),
        "margin": MARGIN,
        "excluding_zero": sum(one["bootstrap_excludes_zero"] for one in found),
        "excluding_zero_after_holm": sum(one["approximate_p_holm"] <= LEVEL for one in found),
        "rows": found,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
