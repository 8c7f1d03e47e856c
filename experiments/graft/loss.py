"""The loss of a grafted model on books by distance from the start of the text, beside caches without training.

One block a book. Each is read in one pass under the mask of its row, which equals dropping the columns (a test of the
package holds that); the last two kinds without training really drop them. Rows, all with 4 sinks:

    full              every token
    sinks@N           StreamingLLM with as many columns as the graft of period N has at the end of the block
    every@N           a window, and every N-th token before it
    graft@N           a graft of period N without training
    separators@N      a window, and the newest tokens before it that end a clause, with at most as many columns
    pooled@N          a window, and means of spans of tokens before it, with at most as many columns
    NAME              a trained graft, given as NAME=FOLDER; its period is its own

Besides the ranges of distances, which double, there is that of the last window, which presses.py measures too.

A file has a line for each row and block. One that is begun is gone on with; whatever it lacks is measured.

    python experiments/graft/loss.py measure MODEL BOOKS --blocks 40 --out experiments/graft/loss.jsonl
    python experiments/graft/loss.py summarise experiments/graft/loss.jsonl --out experiments/graft/loss.json
    python experiments/graft/loss.py collect RUN ... --out experiments/graft/training.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from metatokens.config.graft import GRAFT_FILE
from metatokens.evaluation.eviction import Budget, Reader
from metatokens.evaluation.eviction.policies import find_policy
from metatokens.evaluation.long_context.loss_by_distance import SKIPPED_SHARE, ranges_of
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.subject import Subject
from metatokens.evaluation.statistics import bootstrap_paired_ratio, bootstrap_ratio
from metatokens.graft import GraftConfig, graft, load_graft, ungraft
from metatokens.graft.grafting import graft_of

SINKS = 4
CHUNK = 256  # tokens of a pass where columns are dropped
CHARACTERS_OF_A_TOKEN = 12  # more than a tokenizer needs on average
KINDS = ("full", "sinks", "every", "graft", "separators", "pooled")
Losses = Callable[[Tensor], Tensor]


def count_columns(config: GraftConfig, length: int) -> int:
    """Return how many columns the caches of a graft have at the end of a text; meta-attention has one of its own."""
    anchors = length // config.every - config.num_sinks // config.every
    return config.num_sinks + config.window + anchors * (1 + config.meta_attention)


def keep(length: int, window: int, every: int | None) -> Tensor:
    """Return (T, T) bool: a token sees the sinks, its window, and every n-th token if that is given."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = (key > query - window) | (key < SINKS)
    if every is not None:
        seen |= (key + 1) % every == 0
    return seen & (key <= query)


def under_mask(model: Any, seen: Tensor) -> Losses:
    """Return what measures the loss of the plain model under a mask."""
    dtype = model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
    return lambda ids: next_token_losses(
        model(ids, attention_mask=mask, position_ids=torch.arange(len(seen))[None], use_cache=False).logits, ids
    )


def grafted(model: Any, attach: Callable[[], Any]) -> Losses:
    """Return what measures the loss of the model with a graft, which it has for that time alone."""

    def measure(ids: Tensor) -> Tensor:
        attach()
        try:
            return next_token_losses(model(ids, use_cache=False).logits, ids)
        finally:
            ungraft(model)

    return measure


def dropping(subject: Subject, policy: str, budget: Budget) -> Losses:
    """Return what measures the loss while columns are dropped by a policy of the long-context suite."""

    def measure(ids: Tensor) -> Tensor:
        reader = Reader(subject.model, find_policy(policy), budget, separators=subject.separators)
        return next_token_losses(torch.cat([reader.read(part) for part in ids.split(CHUNK, 1)], 1), ids)

    return measure


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the nats of each token but the first, (T - 1,)."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def rows_of(options: argparse.Namespace, subject: Subject) -> Iterator[tuple[str, int, Losses]]:
    """Yield the name of each row, its columns at the end of a block, and what measures it."""
    length, window, model = options.length, options.window, subject.model
    if "full" in options.kinds:
        yield "full", length, under_mask(model, torch.ones(length, length, dtype=torch.bool).tril())
    for every in options.every:
        config = GraftConfig(window=window, num_sinks=SINKS, every=every)
        columns = count_columns(config, length)
        budget = Budget(columns=columns, length=length, sinks=SINKS, window=window)
        measures: dict[str, Callable[[], Losses]] = {
            "sinks": lambda columns=columns: under_mask(model, keep(length, columns - SINKS, None)),
            "every": lambda every=every: under_mask(model, keep(length, window, every)),
            "graft": lambda config=config: grafted(model, lambda: graft(model, config)),
            "separators": lambda budget=budget: dropping(subject, "separators", budget),
            "pooled": lambda budget=budget: dropping(subject, "pooled", budget),
        }
        for kind, make in measures.items():
            if kind in options.kinds:
                yield f"{kind}@{every}", columns, make()
    for name, folder in (given.split("=", 1) for given in options.trained):
        load_graft(folder, model)
        config = graft_of(model).config
        ungraft(model)
        columns = count_columns(config, length)
        yield name, columns, grafted(model, lambda folder=folder: load_graft(folder, model))


def blocks_of(options: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the ids (1, T) of a block of each book, behind its first tenth."""
    number = 0
    for book in Material(books=options.books).books:
        begin = book.text.find(" ", int(SKIPPED_SHARE * len(book.text))) + 1
        text = book.text[begin : begin + CHARACTERS_OF_A_TOKEN * options.length]
        ids = tokenizer(text, add_special_tokens=False).input_ids[: options.length]
        if len(ids) == options.length and number < options.blocks:
            number += 1
            yield book.name, torch.tensor([ids])


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Add what is missing to the file."""
    torch.set_num_threads(1)
    done = set()
    if options.out.exists():
        done = {(line["row"], line["block"]) for line in map(json.loads, options.out.read_text().splitlines())}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = list(rows_of(options, Subject(model, tokenizer, prefix=())))
    blocks = list(blocks_of(options, tokenizer))
    ranges = [*ranges_of(options.length), (options.length - options.window + 1, options.length - 1)]
    with options.out.open("a") as file:
        for number, (name, ids) in enumerate(blocks):
            for row, columns, losses in rows:
                if (row, name) in done:
                    continue
                while options.wait_while is not None and options.wait_while.exists():
                    time.sleep(5)
                nats = losses(ids).double()
                means = {f"{low}-{high}": float(nats[low - 1 : high].mean()) for low, high in ranges}
                file.write(json.dumps({"row": row, "block": name, "columns": columns, "nats": means}) + "\n")
                file.flush()
            print(f"{number + 1} of {len(blocks)}", file=sys.stderr)


def summarise(options: argparse.Namespace) -> None:
    """Write the means over blocks, and the paired differences from the whole cache and from rows of as many columns."""
    lines = [json.loads(line) for line in options.file.read_text().splitlines()]
    by_row: dict[str, dict[str, Any]] = {}
    for line in lines:
        by_row.setdefault(line["row"], {})[line["block"]] = line
    shared = sorted(set.intersection(*(set(blocks) for blocks in by_row.values())))
    # an older file lacks the range of the last window
    ranges = set.intersection(*(set(line["nats"]) for line in lines))
    table = []
    for row, blocks in by_row.items():
        columns = next(iter(blocks.values()))["columns"]
        rivals = [name for name, others in by_row.items() if next(iter(others.values()))["columns"] == columns]
        for distances in (name for name in blocks[shared[0]]["nats"] if name in ranges):
            own = [blocks[block]["nats"][distances] for block in shared]

            def difference(other: str, own: list[float] = own, distances: str = distances) -> dict[str, Any]:
                against = [by_row[other][block]["nats"][distances] for block in shared]
                return asdict(bootstrap_paired_ratio(own, against, [1.0] * len(own), seed=0))

            compared = ("sinks@", "every@")
            against = [name for name in rivals if name != row and (name.startswith(compared) or "@" not in name)]
            table.append(
                {
                    "row": row,
                    "distances": distances,
                    "columns": columns,
                    "nats": asdict(bootstrap_ratio(own, [1.0] * len(own), seed=0)),
                    "minus_full": None if row == "full" else difference("full"),
                    **{f"minus_{name.split('@')[0]}": difference(name) for name in against},
                }
            )
    document = {"blocks": shared, "rows": table}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


def collect(options: argparse.Namespace) -> None:
    """Write what the runs of the trained grafts took and came to."""
    kept = ("num_parameters", "steps", "text_tokens", "meta_tokens", "validation", "text_tokens_per_second")
    runs = {}
    for run in options.runs:
        result = json.loads((run / "result.json").read_text())
        adapter = (run / "model" / GRAFT_FILE).stat().st_size
        runs[run.name] = {name: result[name] for name in kept} | {"adapter_bytes": adapter}
    options.out.write_text(json.dumps(runs, indent=1) + "\n")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("measure")
    one.add_argument("model", type=Path, help="folder of a decoder of transformers")
    one.add_argument("books", type=Path, help="folder of books")
    one.add_argument("--blocks", type=int, default=40)
    one.add_argument("--length", type=int, default=1024, help="tokens of a block")
    one.add_argument("--window", type=int, default=128)
    one.add_argument("--every", type=int, nargs="*", default=[10, 4], help="periods of the rows without training")
    one.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="rows without training")
    one.add_argument("--trained", nargs="*", default=[], metavar="NAME=FOLDER", help="trained grafts of this model")
    one.add_argument("--wait-while", type=Path, metavar="FILE", help="rest as long as this file exists")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(work=measure)
    two = verbs.add_parser("summarise")
    two.add_argument("file", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(work=summarise)
    three = verbs.add_parser("collect")
    three.add_argument("runs", type=Path, nargs="+", help="folders of runs of `metatokens graft`")
    three.add_argument("--out", type=Path, required=True)
    three.set_defaults(work=collect)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
