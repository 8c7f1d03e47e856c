"""Speeds, costs, perplexities and faults that benchmarks and campaigns measured."""

from collections import Counter
from functools import partial
from typing import Any

from measured.source import ROOT, load, percent, span, table

BOOKS, PIPELINE, ROWS = (
    f"benchmarks/results/{name}.json" for name in ("books_perplexity", "data_pipeline", "analysis_cpu")
)
FAULTS = "tests/faults/results"


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
    return table(["of", *kinds, "GFLOP/s of products"], rows)


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
    return table(["step", "speed"], rows)


def analysis_measures() -> str:
    """Return the table of the measures of an analysis that cost more than a forward pass."""
    found = load("benchmarks/results/analysis_measures.json")
    dear = [row for row in found["measures"] if row["forward_passes"] > 1]
    rows = [[f"`{row['measure']}`", f"{row['forward_passes']:.1f}"] for row in dear]
    rest = sum(row["forward_passes"] for row in found["measures"]) - sum(row["forward_passes"] for row in dear)
    rows.append([f"the other {len(found['measures']) - len(dear)}", f"{rest:.1f}"])
    records = sum(row["records_seconds"] for row in found["measures"]) / found["forward_seconds"]
    rows += [["intervals and tests", f"{records:.1f}"], ["all", f"{found['total_forward_passes']:.0f}"]]
    return table(["measure", "forward passes"], rows)


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
    return table(header, rows)


def bench_table(name: str) -> str:
    """Write all ratios of a result of `metatokens bench` with their quartiles."""
    rows = load(f"benchmarks/results/{name}.json")["ratios"]
    cells = [
        (bench_ratio(name, *(one[key] for key in ("part", "above", "below")), per), one)
        for one in rows
        for per in ("text_token", "position")
    ]
    written = [span(figure, ".3f") for figure, _ in cells]
    return table(
        ["seconds of", "part", "ratio per text token (quartiles)", "per position"],
        [
            [f"{one['above']} / {one['below']}", one["part"], text, position]
            for one, text, position in zip(rows, written[::2], written[1::2], strict=True)
        ],
    )


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


TABLES = {
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
}
NAMES = (
    perplexity,
    books_difference,
    most_waiting,
    rows_cost,
    bench_ratio,
    bench_line,
)
