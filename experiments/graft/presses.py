"""Two presses of kvpress on the texts of loss.py and of the long-context suite, in an environment of its own.

kvpress 0.5.5 asks for an older transformers than this package, so the texts go through a file:

    python experiments/graft/presses.py texts MODEL BOOKS --out texts.json          # in the package's environment
    python presses.py measure MODEL texts.json --out presses.json                    # in that of kvpress
    python experiments/graft/loss.py measure MODEL BOOKS --kinds full sinks --out last-window.jsonl
    python experiments/graft/presses.py summarise presses.json last-window.jsonl \
        --out experiments/graft/presses.json                                         # in the package's again

A press reads all but the last window of a text under full attention, and then drops columns, a head for itself. What is
left and the last window have as many columns together as a graft at the end. So its choice has seen all of the text
before the window, which no policy that drops columns while it reads has. Scored are the tokens of the last window of a
block, and the answers to single needles (right if every token is the likeliest).
"""

import argparse
import importlib.metadata
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

PRESSES = {"SnapKV": "SnapKVPress", "expected attention": "ExpectedAttentionPress"}


def write_texts(options: argparse.Namespace) -> None:
    """Write the ids of blocks and needles, and how many columns a graft has."""
    from loss import SINKS, blocks_of, count_columns
    from transformers import AutoTokenizer

    from metatokens.evaluation.long_context.items import make_item
    from metatokens.evaluation.long_context.material import Material
    from metatokens.evaluation.long_context.subject import SubjectTokens
    from metatokens.evaluation.long_context.tasks import find_task
    from metatokens.graft import GraftConfig

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoder = SubjectTokens(tokenizer)
    needles = []
    for index in range(options.needles):
        item = make_item(find_task("needle"), options.length, encoder=encoder, material=Material(), seed=0, index=index)
        needles.append({"prompt": encoder.encode(item.prompt), "whole": encoder.encode(item.prompt + item.answer)})
    configs = [GraftConfig(window=options.window, num_sinks=SINKS, every=every) for every in options.every]
    columns = {one.every: count_columns(one, options.length) for one in configs}
    blocks = {name: ids[0].tolist() for name, ids in blocks_of(options, tokenizer)}
    tree = {"window": options.window, "columns": columns, "blocks": blocks, "needles": needles}
    options.out.write_text(json.dumps(tree) + "\n")


@torch.no_grad()
def read(model: Any, press: Any, ids: list[int], window: int, columns: int) -> torch.Tensor:
    """Return logits (window, V) of the last tokens of a text, of which the last one scores nothing."""
    from transformers import DynamicCache

    cache, before = DynamicCache(), len(ids) - window
    press.compression_ratio = 1 - (columns - window) / before
    with press(model):
        model.model(input_ids=torch.tensor([ids[:before]]), past_key_values=cache)
    assert abs(cache.get_seq_length() - (columns - window)) <= 1, cache.get_seq_length()
    places = torch.arange(before, len(ids))[None]
    logits: torch.Tensor = model(torch.tensor([ids[before:]]), past_key_values=cache, position_ids=places).logits
    return logits[0]


def measure(options: argparse.Namespace) -> None:
    """Add what is missing to the file."""
    import kvpress
    import transformers

    torch.set_num_threads(1)
    texts = json.loads(options.texts.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    versions = {module.__name__: module.__version__ for module in (torch, transformers)} | {
        "kvpress": importlib.metadata.version("kvpress")
    }
    tree = {"versions": versions, "window": texts["window"], "nats": {}, "right": {}}
    if options.out.exists():
        tree = json.loads(options.out.read_text())
    window = texts["window"]
    for every, columns in texts["columns"].items():
        for name, press_class in PRESSES.items():
            press, row = getattr(kvpress, press_class)(), f"{name}@{every}"
            nats = tree["nats"].setdefault(row, {})
            for block, ids in texts["blocks"].items():
                if block not in nats:
                    logits = read(model, press, ids, window, columns)
                    targets = torch.tensor(ids[-window + 1 :])
                    nats[block] = float(torch.nn.functional.cross_entropy(logits[:-1].double(), targets))
                    options.out.write_text(json.dumps(tree, indent=1) + "\n")
            right = tree["right"].setdefault(row, [])
            for needle in texts["needles"][len(right) :]:
                ids, first = needle["whole"], len(needle["prompt"])
                best = read(model, press, ids, window, columns).argmax(-1).tolist()
                written = best[first - 1 - (len(ids) - window) : -1]
                right.append(written == ids[first:])
                options.out.write_text(json.dumps(tree, indent=1) + "\n")
            print(row, file=sys.stderr)


def summarise(options: argparse.Namespace) -> None:
    """Write the means of presses and grafts, beside the whole cache and StreamingLLM in the last window of a block."""
    from metatokens.evaluation.statistics import bootstrap_paired_ratio, wilson_interval

    tree = json.loads(options.file.read_text())
    length = 1024
    distances = f"{length - tree['window'] + 1}-{length - 1}"
    others: dict[str, dict[str, float]] = {}
    sinks: dict[str, str] = {}
    lines = [json.loads(line) for line in options.losses.read_text().splitlines()]
    of_columns = {line["columns"]: line["row"] for line in lines if line["row"].startswith("sinks@")}
    for line in lines:
        others.setdefault(line["row"], {})[line["block"]] = line["nats"][distances]
        sinks[line["row"]] = of_columns.get(line["columns"], "")
    sinks |= {row: f"sinks@{row.split('@')[1]}" for row in tree["nats"]}
    rows = []
    for row, nats in (tree["nats"] | others).items():
        if row == "full" or row.startswith("sinks@"):
            continue
        found: dict[str, Any] = {"row": row, "sinks": sinks[row]}
        if right := tree["right"].get(row):
            found["right"] = asdict(wilson_interval(sum(right), len(right)))
        for name in ("full", sinks[row]):
            shared = sorted(nats.keys() & others[name].keys())
            pairs = [nats[block] for block in shared], [others[name][block] for block in shared]
            found[f"minus_{name.split('@')[0]}"] = asdict(bootstrap_paired_ratio(*pairs, [1.0] * len(shared), seed=0))
            found["blocks"] = len(shared)
        rows.append(found)
    options.out.write_text(json.dumps({"distances": distances, "rows": rows, **tree}, indent=1) + "\n")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("texts")
    one.add_argument("model", type=Path, help="folder of a decoder of transformers")
    one.add_argument("books", type=Path, help="folder of books")
    one.add_argument("--blocks", type=int, default=40)
    one.add_argument("--needles", type=int, default=25)
    one.add_argument("--length", type=int, default=1024, help="tokens of a text")
    one.add_argument("--window", type=int, default=128)
    one.add_argument("--every", type=int, nargs="*", default=[10, 4])
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(work=write_texts)
    two = verbs.add_parser("measure")
    two.add_argument("model", type=Path)
    two.add_argument("texts", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(work=measure)
    three = verbs.add_parser("summarise")
    three.add_argument("file", type=Path, help="what measure wrote")
    three.add_argument("losses", type=Path, help="lines of loss.py")
    three.add_argument("--out", type=Path, required=True)
    three.set_defaults(work=summarise)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
