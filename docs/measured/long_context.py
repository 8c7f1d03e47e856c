"""experiments/long-context."""

from measured.source import load, span, table

LONG = "experiments/long-context"


def needle(name: str) -> str:
    """Return the share of single needles that SmolLM2-135M finds with its whole cache."""
    (row,) = load(f"{LONG}/{name}.json")["rows"]
    return span(row["accuracy"], ".0f", 100, "%")


def long_context_needle() -> str:
    rows = [
        [
            row["policy"],
            span(row["accuracy"], ".0f", 100),
            "" if row["difference"] is None else span(row["difference"], ".0f", 100),
            f"{row['columns']:.0f}",
            f"{row['cache_bytes'] / 2**20:.1f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in load(f"{LONG}/policies.json")["rows"]
    ]
    header = ["policy", "right, %", "minus full, points", "columns", "cache, MiB", "peak of the process, MiB"]
    return table(header, rows)


def long_context_loss() -> str:
    losses = load(f"{LONG}/loss.json")["losses"]
    ranges = list(dict.fromkeys(tuple(one["distances"]) for one in losses))
    rows = []
    for policy in dict.fromkeys(one["policy"] for one in losses if one["difference"]):
        own = {tuple(one["distances"]): one for one in losses if one["policy"] == policy}
        cells = [span(own[distances]["difference"], ".3f") for distances in ranges]
        rows.append(
            [policy, *cells, f"{own[ranges[0]]['columns']:.0f}", f"{own[ranges[0]]['cache_bytes'] / 2**20:.1f}"]
        )
    return table(["policy", *(f"{low}-{high}" for low, high in ranges), "columns", "cache, MiB"], rows)


TABLES = {"long-context-needle": long_context_needle, "long-context-loss": long_context_loss}
NAMES = (needle,)
