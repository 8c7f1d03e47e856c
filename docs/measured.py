"""Where the numbers of README, docs and experiments come from: committed JSON, and nothing else; see facts.py.

A function returns a number or text of one file; an expression in a document puts them together. Tables are made whole;
that of the measures of an analysis comes from their registry.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from metatokens.analysis.run import MEASURES  # with every measure registered
from metatokens.config.analysis import Part

PARTS = get_args(Part)
ROOT = Path(__file__).parents[1]
BOOKS, PIPELINE, ROWS = (
    f"benchmarks/results/{name}.json" for name in ("books_perplexity", "data_pipeline", "analysis_cpu")
)
RECALL, INSIDE, FAULTS = "experiments/tiny-recall", "experiments/tiny-analysis", "tests/faults/results"
LONG, MEMORY = "experiments/long-context", "experiments/tiny-memory"
GRAFTS = "experiments/graft"
GRAFT = f"{GRAFTS}/loss.json"
FOLDERS = ("books", "list_recall", "parity")
ARMS = ("pause", "parameter-matched", "double-attention", "meta-rope", "meta-learned")
TASKS = ("list_recall", "parity", "copying", "segment_counting")
LENGTHS = {"L": "33-64", "2 L": "65-128", "4 L": "129-256"}


@cache
def load(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def span(number: Any, form: str, scale: float = 1, unit: str = "") -> str:
    """Write an interval or a record: the estimate, and from where to where."""
    estimate = number["estimate"] if "estimate" in number else number["value"]
    low, high = number["low"], number["high"]
    return f"{scale * estimate:{form}}{unit} ({scale * low:{form}} to {scale * high:{form}})"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


# the benchmarks ----------------------------------------------------------------------------------------------


def perplexity(score: str, windows: str = "sliding", *, interval: bool = False) -> str:
    found = load(BOOKS)["scores"][score][windows]["perplexity"]
    return span(found, ".1f") if interval else f"{found['estimate']:.1f}"


def books_difference(score: str) -> str:
    return span(load(BOOKS)["difference_from_plain_nats_per_token"][score]["sliding"], ".3f")


def most_waiting() -> float:
    return max(run["waited_for_batches"] for run in load(BOOKS)["training"].values())


def bench_ratio(name: str, part: str, above: str, below: str, per: str = "text_token") -> Any:
    """Return a ratio of a result of `metatokens bench`, in the form that `span` writes; `per` may be position."""
    rows = load(f"benchmarks/results/{name}.json")["ratios"]
    (found,) = [one for one in rows if (one["part"], one["above"], one["below"]) == (part, above, below)]
    figure = found[f"per_{per}"]
    return {"estimate": figure["median"], "low": figure["low"], "high": figure["high"]}


def bench_line(name: str, contender: str, part: str, key: str) -> float:
    """Return a figure of a contender of `metatokens bench`, such as share_of_limit."""
    rows = load(f"benchmarks/results/{name}.json")["lines"]
    (found,) = [one for one in rows if (one["contender"], one["part"]) == (contender, part)]
    return float(found[key])


def rows_cost(length: int, way: str, key: str = "cpu_seconds") -> float:
    (found,) = [one for one in load(ROWS)["results"] if (one["length"], one["way"]) == (length, way)]
    return float(found[key])


def profile() -> str:
    """Return the table of the kinds of operators of a training step and of decoding."""
    found = load("benchmarks/results/profile_steps.json")["results"]
    kinds = list(next(iter(found.values()))["shares"])
    rows = [
        [
            name,
            *(percent(one["shares"][kind]) for kind in kinds),
            f"{one['operations_per_second_of_products'] / 1e9:.0f}",
        ]
        for name, one in found.items()
    ]
    return _table(["of", *kinds, "GFLOP/s of products"], rows)


def data_pipeline() -> str:
    """Return the table of the steps between text and training."""
    found = load("benchmarks/results/data_pipeline.json")
    one, all_cores = found["prepare"], found["prepare_on_all_cores"]
    injected = found["injection_million_positions_per_second"]
    rows = [
        ["tokenising with the GPT-2 BPE", f"{found['tokenising_megabytes_per_second']['ours']:.1f} MB/s"],
        ["the same with tokenizers", f"{found['tokenising_megabytes_per_second']['tokenizers']:.1f} MB/s"],
        ["`prepare` on one core", f"{one['megabytes_per_second_after_start']:.1f} MB/s"],
        ["on two cores, by threads", f"{all_cores['threads']['megabytes_per_second_after_start']:.1f} MB/s"],
        ["on two cores, by processes", f"{all_cores['processes']['megabytes_per_second_after_start']:.1f} MB/s"],
        ["injection, uniform", f"{injected['positions_uniform_and_inject']:.0f}M positions/s"],
        ["loader", f"{found['loader']['million_text_tokens_per_second']:.0f}M text tokens/s"],
        ["verification of shards", f"{found['files_megabytes_per_second']['verify']:,.0f} MB/s"],
    ]
    return _table(["step", "speed"], rows)


def analysis_measures() -> str:
    """Return the table of the measures of an analysis that cost more than a forward pass."""
    found = load("benchmarks/results/analysis_measures.json")
    dear = [row for row in found["measures"] if row["forward_passes"] > 1]
    rows = [[f"`{row['measure']}`", f"{row['forward_passes']:.1f}"] for row in dear]
    rest = sum(row["forward_passes"] for row in found["measures"]) - sum(row["forward_passes"] for row in dear)
    rows.append([f"the other {len(found['measures']) - len(dear)}", f"{rest:.1f}"])
    records = sum(row["records_seconds"] for row in found["measures"]) / found["forward_seconds"]
    rows += [["intervals and tests", f"{records:.1f}"], ["all", f"{found['total_forward_passes']:.0f}"]]
    return _table(["measure", "forward passes"], rows)


# decomposition -----------------------------------------------------------------------------------------------


def solve_contrasts(task: str, at_equal: str, verdict: str) -> int:
    """Return how many of the contrasts of E1 have a verdict; `at_equal` is steps or operations."""
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    return sum(row["verdict"] == verdict for row in found[f"at_equal_{at_equal}"])


def solve_ratio(task: str, first: str, second: str) -> str:
    """Return the ratio of the steps of two arms, with its interval."""
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    (row,) = [row for row in found["at_equal_steps"] if (row["first"], row["second"]) == (first, second)]
    return span(row["ratio"], ".2f")


# long-context ------------------------------------------------------------------------------------------------


def needle(name: str) -> str:
    """Return the share of single needles that SmolLM2-135M finds with its whole cache."""
    (row,) = load(f"{LONG}/{name}.json")["rows"]
    return span(row["accuracy"], ".0f", 100, "%")


# tiny-memory -------------------------------------------------------------------------------------------------


def memory_pilots() -> str:
    rows = []
    for pilot in load(f"{MEMORY}/pilots.json")["pilots"]:
        own = pilot["settings"]
        rows.append(
            [
                f"{own['span']} of {own['symbols']}, {own['distance']} between",
                own["reveal"],
                f"{own['positions']}, {own['rope_theta']:,}" if "rope_theta" in own else own["positions"],
                f"{own['mlp']}, {own['activation']}",
                str(own["batch"]),
                f"{pilot['steps'][-1]:,}",
                percent(pilot["words_right"][-1]),
                f"{pilot['cpu_seconds'][-1]:.0f}",
            ]
        )
    header = ["words", "reveal", "positions", "MLP", "batch", "steps", "words right", "CPU-seconds"]
    return _table(header, rows)


def memory_recall_pilots() -> str:
    rows = []
    for one in load(f"{MEMORY}/pilots.json")["recall"]["tries"]:
        own = one["settings"]
        settings = f"{own['positions']}, {own['heads']} heads, std {own['initializer_range']:g}"
        rows.append(
            [
                f"{own['pairs']} of {own['words']}, {own['between']} between",
                f"`{own['text']}`, `{own['question']}`, {own['asked']}",
                settings if own["tied"] else f"{settings}, untied",
                f"{own['learning_rate']:g}, {own['batch']}",
                f"{one['steps'][-1]:,}",
                percent(one["answers_right"][-1]),
                percent(one["guess"]),
                f"{one['cpu_seconds']:.0f}",
            ]
        )
    header = ["pairs", "text and question", "model", "rate, batch", "steps", "answers right", "a guess", "CPU-seconds"]
    return _table(header, rows)


def memory_pilot(row: int, step: int) -> str:
    """Return the share of words that a pilot had right at a step."""
    pilot = load(f"{MEMORY}/pilots.json")["pilots"][row]
    return percent(pilot["words_right"][pilot["steps"].index(step)])


MEMORY_ARMS = ("window", "sinks", "same-cache", "every", "pause", "meta", "meta-equal-bytes", "pooled", "full")


def _memory_runs(*sweeps: str) -> dict[tuple[str, int], Any]:
    """Return the trainings of some sweeps by arm and seed."""
    known = [one for name in ("runs", "earlier") for one in load(f"{MEMORY}/{name}.json")["runs"]]
    return {(one["arm"], one["seed"]): one for one in known if one["sweep"] in sweeps}


def memory_runs(*sweeps: str) -> str:
    runs = _memory_runs(*sweeps)
    seeds = sorted({seed for _, seed in runs})

    def cell(arm: str, seed: int) -> str:
        one = runs.get((arm, seed))
        if one is None:
            return "not run"
        at = f"{one['evaluated_at'][-1]:,}"
        return {"solved": f"solved at {at}", "censored": percent(one["words_right"][-1])}.get(
            one["state"], f"{percent(one['words_right'][-1])} at {at}, {one['state']}"
        )

    arms = [arm for arm in MEMORY_ARMS if arm in {arm for arm, _ in runs}]
    return _table(
        ["arm", *(f"seed {seed}" for seed in seeds)], [[arm, *(cell(arm, seed) for seed in seeds)] for arm in arms]
    )


def memory_words(arm: str, seed: int = 0, sweep: str = "copying") -> str:
    """Return the share of words right at the last evaluation of a training."""
    return percent(_memory_runs(sweep)[arm, seed]["words_right"][-1])


def memory_range(arm: str, sweep: str = "copying") -> str:
    """Return the lowest and the highest share of words right at the last evaluation of an arm's trainings."""
    shares = [one["words_right"][-1] for (name, _), one in _memory_runs(sweep).items() if name == arm]
    return f"{100 * min(shares):.0f} to {percent(max(shares))}"


def memory_solved(arm: str, sweep: str = "copying") -> int:
    """Return how many trainings of an arm reached the endpoint."""
    return sum(one["state"] == "solved" for (name, _), one in _memory_runs(sweep).items() if name == arm)


def memory_gaps(first: str, second: str, sweep: str = "copying", step: int | None = 2000) -> str:
    """Return by how many points two arms differ in words right at a step or, for None, at the last, seed by seed."""
    runs = _memory_runs(sweep)

    def right(arm: str, seed: int) -> float:
        one = runs[arm, seed]
        return 100 * float(one["words_right"][-1 if step is None else one["evaluated_at"].index(step)])

    seeds = sorted(seed for arm, seed in runs if arm == first and (second, seed) in runs)
    return ", ".join(f"{right(first, seed) - right(second, seed):+.0f}" for seed in seeds)


def _books_of_memory(arm: str) -> Any:
    cells = load(f"{MEMORY}/books.json")["cells"]
    return next(one for one in cells if one["labels"]["arm"] == arm)["perplexities"][0]


def memory_books() -> str:
    """Return nats per word of test books under each arm, and the differences from `every`."""
    rows = []
    for arm in MEMORY_ARMS:
        own = _books_of_memory(arm)
        difference = "" if own["difference"] is None or arm == "every" else span(own["difference"], "+.3f")
        seeds = "" if arm == "every" else ", ".join(f"{one:+.3f}" for one in own["difference_by_seed"])
        rows.append([arm, span(own["nats_per_word"], ".2f"), difference, seeds])
    return _table(["arm", "nats per word", "minus `every`", "seed by seed"], rows)


def memory_books_at(arm: str, lowest: int) -> float:
    """Return the nats per token of an arm where at least so many tokens stand before, and fewer than twice as many."""
    contexts = _books_of_memory(arm)["by_context"]
    return float(next(one["nats_per_token"] for one in contexts if one["lowest"] == lowest))


def memory_books_minus(arm: str) -> Any:
    """Return the nats per word of an arm minus those of `every`."""
    return _books_of_memory(arm)["difference"]


# tiny-recall -------------------------------------------------------------------------------------------------


def cell(task: str, arm: str) -> Any:
    return next(c for c in load(f"{RECALL}/results.json")["cells"] if c["labels"] == {"task": task, "arm": arm})


def recall(task: str, arm: str, length: str = "L", evaluation: str = "length") -> Any:
    """Return the mean accuracy over seeds; None if it was not measured or the model cannot represent the length."""
    for one in cell(task, arm)["evaluations"]:
        for row in one["rows"]:
            if one["name"] == evaluation and row["length"] == LENGTHS[length] and row["sequence_accuracy"]:
                return row["sequence_accuracy"]["estimate"]
    return None


def trained(task: str, arm: str) -> list[float]:
    """Return the accuracy of the three seeds at the end of training, on 100 prompts of up to L, from the lowest.

    results.json has the mean, the lowest and the highest of them.
    """
    last = cell(task, arm)["curve"][-1]
    assert len(cell(task, arm)["seeds"]) == 3
    low, high = last["lowest"], last["highest"]
    return [low, 3 * last["sequence_accuracy"] - low - high, high]


def seeds(task: str, arm: str) -> str:
    return " / ".join(f"{100 * one:.0f}" for one in trained(task, arm))


def contrast(task: str, arm: str, length: str, key: str = "difference", evaluation: str = "length") -> float:
    where = {"task": task, "arm": arm, "length": LENGTHS[length], "evaluation": evaluation}
    return next(
        float(row[key]) for row in load(f"{RECALL}/contrasts.json")["rows"] if {k: row[k] for k in where} == where
    )


def contrasts(key: str) -> int:
    return int(load(f"{RECALL}/contrasts.json")[key])


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def hint(key: str) -> float:
    return float(load(f"{RECALL}/hint.json")["accuracy"][key])


def extended(window: str, length: int) -> Any:
    """Return the accuracy of an extended model at prompts of up to this multiple of L."""
    cells = load(f"{RECALL}/extension-results.json")["cells"]
    (found,) = [c for c in cells if c["labels"]["window"] == window]
    rows = {row["prompt_tokens"][1] // 64: row["sequence_accuracy"] for row in found["evaluations"][0]["rows"]}
    return rows[length]


def tried(name: str) -> float:
    (found,) = [one for one in load(f"{RECALL}/tried.json")["tries"] if one["name"] == name]
    return float(max(found["accuracy_by_step"].values()))


# tiny-analysis -----------------------------------------------------------------------------------------------


def record(folder: str, measure: str, **at: Any) -> Any:
    """Return a record of an analysis; `folder` is one of the three, or a run of seeds.json."""
    source = load(f"{INSIDE}/seeds.json")
    records = source[folder]["records"] if folder in source else load(f"{INSIDE}/{folder}/results.json")["records"]
    found = [r for r in records if r["measure"] == measure and r["at"] == at]
    assert len(found) == 1, f"{len(found)} records of {folder} {measure} {at}"
    return found[0]


def value(folder: str, measure: str, **at: Any) -> float:
    return float(record(folder, measure, **at)["value"])


def largest(folder: str, measure: str, **at: Any) -> float:
    return max(_values(folder, measure, at))


def smallest(folder: str, measure: str, **at: Any) -> float:
    return min(_values(folder, measure, at))


def _values(folder: str, measure: str, at: dict[str, Any]) -> list[float]:
    records = load(f"{INSIDE}/{folder}/results.json")["records"]
    return [
        r["value"]
        for r in records
        if r["measure"] == measure and r["value"] is not None and "layer" in r["at"] and at.items() <= r["at"].items()
    ]


def verdict(folder: str, claim: str) -> Any:
    """Return the verdict whose claim begins with these words."""
    verdicts = load(f"{INSIDE}/{folder}/results.json")["verdicts"]
    return next(one for one in verdicts if one["claim"].startswith(claim))


def entropy_falls() -> tuple[int, int]:
    """Return the number of models whose sharpening has an interval above 0, and the number of all models."""
    lows = [record(folder, "sharpening")["low"] for folder in (*FOLDERS, *load(f"{INSIDE}/seeds.json"))]
    return sum(low > 0 for low in lows), len(lows)


# the tables --------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracy(number: float | None) -> str:
    return "n/a" if number is None else f"{100 * number:.0f}"


def training_cost() -> str:
    """Write what a step costs with meta-tokens, by its parts and the size of the vocabulary."""
    pairs = [("meta", "plain"), ("meta_indices", "plain"), ("meta_indices", "plain_text")]
    whole = {"forward and backward": "forward and backward", "step": "step with AdamW"}
    decoder = {"decoder forward": "decoder, forward", "decoder": "decoder, forward and backward"}
    rows = [
        [f"{shown}{words}", *(span(bench_ratio(name, part, *pair), ".2f") for pair in pairs)]
        for name, parts, words in (
            ("training_close", decoder, ""),
            ("training_close", whole, ", 8,192 words"),
            ("training_full_vocabulary", whole, ", 50,257 words"),
        )
        for part, shown in parts.items()
    ]
    header = [
        "",
        "meta-attention / none",
        "the same, told where they stand",
        "meta-tokens / text alone, per text token",
    ]
    return _table(header, rows)


def bench_table(name: str) -> str:
    """Write all ratios of a result of `metatokens bench` with their quartiles."""
    rows = load(f"benchmarks/results/{name}.json")["ratios"]
    cells = [
        (bench_ratio(name, *(one[key] for key in ("part", "above", "below")), per), one)
        for one in rows
        for per in ("text_token", "position")
    ]
    written = [span(figure, ".3f") for figure, _ in cells]
    return _table(
        ["seconds of", "part", "ratio per text token (quartiles)", "per position"],
        [
            [f"{one['above']} / {one['below']}", one["part"], text, position]
            for one, text, position in zip(rows, written[::2], written[1::2], strict=True)
        ],
    )


def recall_accuracy() -> str:
    rows = [
        [task, arm, *(_accuracy(recall(task, arm, length)) for length in LENGTHS), seeds(task, arm)]
        for task in TASKS
        for arm in ARMS
    ]
    return _table(["task", "arm", *(f"at {length}" for length in LENGTHS), "seeds, end of training"], rows)


def recall_interventions() -> str:
    names = ("length", "zero-embedding", "zero-position", "no-position-edges", "no-meta-attention")
    rows = []
    for task in TASKS:
        for arm in ARMS:
            for length in ("L", "2 L"):
                found = [recall(task, arm, length, name) for name in names]
                if any(number is not None for number in found[1:]):
                    rows.append([task, arm, length, *("" if one is None else _accuracy(one) for one in found)])
    columns = ["full", "embedding zeroed", "position zeroed", "no position edges", "meta-attention off"]
    return _table(["task", "arm", "at", *columns], rows)


def recall_contrasts() -> str:
    rows = [
        [
            f"{one['task']}: {one['evaluation']}",
            one["arm"],
            one["length"],
            f"{points(one['difference'])} ({points(one['bootstrap_low'])} to {points(one['bootstrap_high'])})",
            f"{one['approximate_p_holm']:.3f}",
            f"{one['approximate_p_alike_holm']:.3f}",
            one["verdict"],
        ]
        for one in load(f"{RECALL}/contrasts.json")["rows"]
    ]
    header = ["task", "arm", "prompt", "minus pause, points", "p, Holm", "p alike, Holm", "verdict"]
    return _table(header, rows)


def recall_extension() -> str:
    rows = []
    for own in load(f"{RECALL}/extension-results.json")["cells"]:
        for length in (2, 4, 6, 8, 10):
            accuracy = span(extended(own["labels"]["window"], length), ".0f", 100)
            windows = str(own["original_window"]), str(own["window"])
            rows.append([*windows, f"{own['trained_to'] // 64} L", str(own["steps"]), f"{length} L", accuracy])
    header = ["original window", "scaled window", "trained to", "steps", "evaluated at", "right, %"]
    return _table(header, rows)


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
    return _table(header, rows)


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
    return _table(["policy", *(f"{low}-{high}" for low, high in ranges), "columns", "cache, MiB"], rows)


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
    return _table(["cache", "every", "columns", *ranges], rows)


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
    return _table(["cache", "columns", "minus full", "minus sinks and window", "needles right, %"], rows)


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
    return _table(["cache", "columns", "right, %"], [["full", "all", span(whole, ".0f", 100)], *rows])


def graft_training(run: str, what: str) -> Any:
    """Return a number of the training of a graft."""
    return load(f"{GRAFTS}/training.json")[run][what]


def graft_from_every() -> float:
    """Return the largest difference of an untrained graft's mean loss from that of every n-th token, of all ranges."""
    rows = [one for one in load(GRAFT)["rows"] if one["row"].startswith("graft")]
    return max(abs(row["minus_every"]["estimate"]) for row in rows)


def inside_verdicts() -> str:
    found = [load(f"{INSIDE}/{folder}/results.json")["verdicts"] for folder in FOLDERS]
    rows = [[one[0]["claim"], one[0]["paper"], *map(_verdict, one)] for one in zip(*found, strict=True)]
    return _table(["claim", "paper", "books", "list recall", "parity"], rows)


def _verdict(verdict: Any) -> str:
    if verdict["verdict"] == "not tested":
        return "-"
    unit = "" if verdict["unit"] == "1" else f" {verdict['unit']}"
    number = f"{verdict['value']:.3g} ({verdict['low']:.3g} to {verdict['high']:.3g}){unit}"
    beside = "" if verdict["share_of_paper"] is None else f", {100 * verdict['share_of_paper']:.0f}% of the paper's"
    note = f" ({verdict['note']})" if verdict["note"] else ""
    return f"{number}{beside}: **{verdict['verdict']}**{note}"


def inside_seeds() -> str:
    models = [
        *(
            ("parity", f"RoPE, seed {seed}", "parity" if not seed else f"parity/meta-rope/seed-{seed}")
            for seed in range(3)
        ),
        ("parity", "learned positions, seed 0", "parity/meta-learned/seed-0"),
        *(
            ("list_recall", f"RoPE, seed {seed}", "list_recall" if not seed else f"list_recall/meta-rope/seed-{seed}")
            for seed in range(3)
        ),
        ("list_recall", "learned positions, seed 0", "list_recall/meta-learned/seed-0"),
    ]
    conditions = ("full", "direct cut", "meta cut", "both cut")
    rows = []
    for task, name, folder in models:
        cut = [f"{value(folder, 'logit_difference', condition=one):.1f}" for one in conditions]
        cut.append(f"{value(folder, 'logit_difference', condition='meta-attention off'):.1f}")
        right = percent(value(folder, "accuracy", intervention="none"))
        drop = span(record(folder, "sharpening"), ".2f")
        rows.append([f"{task}, {name}", right, *cut, drop])
    header = ["model", "right of 64", "whole", *conditions[1:], "meta-attention off", "sharpening, nats"]
    return _table(header, rows)


def measures() -> str:
    header = ["measure", "part", "on", "unit", "by", "statistic", "definition"]
    subjects = {None: "both", "task": "tasks", "text": "text", "graft": "grafts"}
    rows = [
        [
            f"`{one.name}`",
            one.part,
            subjects[one.subject],
            one.unit,
            ", ".join(one.axes),
            one.statistic,
            one.definition,
        ]
        for one in sorted(MEASURES.values(), key=lambda one: PARTS.index(one.part))
    ]
    return _table(header, rows)


def faults() -> str:
    """Tell what the campaigns of tests/faults did, kind by kind."""
    done: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for path in sorted((ROOT / FAULTS).glob("*.json")):
        for outcome in load(f"{FAULTS}/{path.name}").get("outcomes", {}).values():
            done[outcome["counts"]] += outcome["done"]
            failed[outcome["counts"]] += len(outcome["failures"])
    rows = [f"| {counts} | {number:,} | {failed[counts]} |" for counts, number in done.items()]
    return "\n".join(["| | done | failed |", "|---|---:|---:|", *rows]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "faults": faults,
    "training-cost": training_cost,
    **{
        f"bench-{name}": partial(bench_table, name)
        for name in ("training_small_vocabulary", "training_close", "training_full_vocabulary", "training_compiled")
    },
    "bench-generation": partial(bench_table, "generation"),
    "profile": profile,
    "data-pipeline": data_pipeline,
    "analysis-measures": analysis_measures,
    "recall-accuracy": recall_accuracy,
    "recall-interventions": recall_interventions,
    "recall-contrasts": recall_contrasts,
    "recall-extension": recall_extension,
    "long-context-needle": long_context_needle,
    "long-context-loss": long_context_loss,
    "memory-pilots": memory_pilots,
    "memory-recall-pilots": memory_recall_pilots,
    "memory-runs": partial(memory_runs, "copying", "narrower"),
    "memory-controls": partial(memory_runs, "controls"),
    "memory-books": memory_books,
    "graft-loss": graft_loss,
    "graft-needles": graft_needles,
    "graft-presses": graft_presses,
    "inside-verdicts": inside_verdicts,
    "inside-seeds": inside_seeds,
    "measures": measures,
}
FUNCTIONS = (
    *(span, percent, perplexity, books_difference, most_waiting, rows_cost, recall, trained, seeds, contrast),
    *(contrasts, points, hint, extended, tried, record, value, largest, smallest, verdict, entropy_falls, load),
    *(bench_ratio, bench_line, solve_contrasts, solve_ratio, needle, memory_words, memory_pilot, graft_minus),
    *(memory_range, memory_solved, memory_gaps, memory_books_minus, memory_books_at),
    graft_from_every,
    graft_training,
)
NAMES: dict[str, Any] = {function.__name__: function for function in FUNCTIONS} | {"ARMS": ARMS, "min": min, "max": max}
"""What an expression may use."""
