"""experiments/graft."""

from typing import Any

from measured.source import load, span, table

GRAFTS = "experiments/graft"
GRAFT = f"{GRAFTS}/loss.json"


GRAFT_ROWS = {
    "sinks": "sinks and window",
    "every": "every n-th token",
    "separators": "separators",
    "pooled": "pooled",
    "graft": "graft, untrained",
    "trained": "graft, trained",
    "trained-every": "every n-th token, trained alike",
    "trained-longer": "graft, trained four times as long",
}


TRAINED_GRAFTS = {
    "ten": ("trained", 10),
    "ten-every": ("trained-every", 10),
    "ten-long": ("trained-longer", 10),
    "four": ("trained", 4),
    "four-every": ("trained-every", 4),
}


def _graft_rows() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the measured rows by kind and period, each by distances."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in load(GRAFT)["rows"]:
        if row["row"] == "full":
            continue
        kind, _, period = row["row"].partition("@")
        key = (kind, int(period)) if period else TRAINED_GRAFTS[kind]
        found.setdefault(key, {})[row["distances"]] = row
    return found


def graft_loss() -> str:
    """Return the loss of small caches minus that of the whole cache, by distance from the start."""
    found = _graft_rows()
    ranges = [name for name in next(iter(found.values())) if int(name.split("-")[0]) > 128]
    rows = []
    for kind, period in sorted(found, key=lambda key: (_columns(found[key]), list(GRAFT_ROWS).index(key[0]))):
        own = found[kind, period]
        cells = [span(own[distances]["minus_full"], ".3f") for distances in ranges]
        rows.append([GRAFT_ROWS[kind], str(period), f"{own[ranges[0]]['columns']}", *cells])
    return table(["cache", "every", "columns", *ranges], rows)


def _columns(row: dict[str, Any]) -> int:
    """Return how many columns a row has, of all its ranges."""
    return int(next(iter(row.values()))["columns"])


def graft_presses() -> str:
    """Return what presses and grafts lose in the last window, beside the whole cache and StreamingLLM, and needles."""
    rows = []
    for row in load(f"{GRAFTS}/presses.json")["rows"]:
        name, right = row["row"].partition("@")[0], row.get("right")
        if name in TRAINED_GRAFTS:
            kind, _ = TRAINED_GRAFTS[name]
            (scored,) = load(f"{GRAFTS}/needle-{name}.json")["rows"]
            name, right = GRAFT_ROWS[kind], scored["accuracy"]
        losses = [span(row[f"minus_{rival}"], ".3f") for rival in ("full", "sinks")]
        columns = {"sinks@10": "234", "sinks@4": "387"}[row["sinks"]]
        rows.append([name, columns, *losses, span(right, ".0f", 100)])
    return table(["cache", "columns", "minus full", "minus sinks and window", "needles right, %"], rows)


def graft_minus(name: str, period: int, kind: str = "graft", distances: str = "513-1023") -> Any:
    """Return the loss of a graft, or of another kind of row, minus that of another cache of as many columns."""
    return _graft_rows()[kind, period][distances][f"minus_{name}"]


def graft_needles() -> str:
    """Return the share of single needles that small caches find, trained grafts too."""
    rows = []
    for columns, word in ((234, "ten"), (387, "four")):
        suite = load(f"{GRAFTS}/needle-{columns}.json")["rows"]
        found = {GRAFT_ROWS.get(row["policy"], row["policy"]): row["accuracy"] for row in suite}
        of_columns = {"ten": ("ten", "ten-every", "ten-long"), "four": ("four", "four-every")}[word]
        for name in of_columns:
            kind, _ = TRAINED_GRAFTS[name]
            (row,) = load(f"{GRAFTS}/needle-{name}.json")["rows"]
            found[GRAFT_ROWS[kind]] = row["accuracy"]
        rows += [[name, str(columns), span(share, ".0f", 100)] for name, share in found.items() if name != "full"]
        whole = found["full"]
    return table(["cache", "columns", "right, %"], [["full", "all", span(whole, ".0f", 100)], *rows])


def graft_training(run: str, what: str) -> Any:
    """Return a number of the training of a graft."""
    return load(f"{GRAFTS}/training.json")[run][what]


def graft_from_every() -> float:
    """Return the largest difference of an untrained graft's mean loss from that of every n-th token, of all ranges."""
    rows = [one for one in load(GRAFT)["rows"] if one["row"].startswith("graft")]
    return max(abs(row["minus_every"]["estimate"]) for row in rows)


TABLES = {"graft-loss": graft_loss, "graft-needles": graft_needles, "graft-presses": graft_presses}
NAMES = (
    graft_minus,
    graft_from_every,
    graft_training,
)
