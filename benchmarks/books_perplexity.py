"""Does a tiny model with meta-tokens read books better than its plain twin? Real text, the whole way through.

Cuts Project Gutenberg books to their bodies (a manifest gives the offsets), prepares them with the GPT-2 BPE,
pre-trains tiny/plain and tiny/meta on the same text tokens from the same seed, and scores PG-19 test books under
the protocol of `metatokens perplexity`, the meta model with every injection, in windows of as many text tokens and
of as many positions as the plain model's. Every step is a command of the package; the JSON holds them all, and the
SHA-256 and the number of tokens of each book. A run that was cut off goes on where it was.

    python benchmarks/books_perplexity.py --books BOOKS --tokenizer GPT2 --work WORK \
        --out benchmarks/results/books_perplexity.json
"""

import argparse
import gzip
import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metatokens.data.tokenizer import TextEncoder, load_text_tokenizer
from metatokens.evaluation.statistics import bootstrap_paired_ratio

MAX_TOKENS_A_BOOK = 20_000
WINDOW = 230  # text tokens of a training block of both models, and positions of the plain one's
STRIDE = 64
RATIO = 0.1
TRAINING_KEYS = (
    *("num_parameters", "steps", "text_tokens", "meta_tokens", "final_loss", "validation"),
    "waited_for_batches",
)
# (model, injection, window unit); without meta-tokens the units are one
SCORED = (
    *(("plain", "none", "text"), ("meta", "none", "text"), ("meta", "periodic", "text"), ("meta", "uniform", "text")),
    *(("meta", "periodic", "positions"), ("meta", "uniform", "positions")),
)


def cut_bodies(books: Path, work: Path, test_books: int) -> None:
    """Write each book without the Gutenberg header and licence as a text file under train/ or test/."""
    entries = json.loads((books / "manifest.json").read_text())["books"]
    test = sorted(entry["gutenberg_id"] for entry in entries if entry["in_pg19_test"])[:test_books]
    for entry in entries:
        if entry["in_pg19_test"] and entry["gutenberg_id"] not in test:
            continue
        folder = work / ("test" if entry["in_pg19_test"] else "train")
        folder.mkdir(parents=True, exist_ok=True)
        text = gzip.decompress((books / entry["file"]).read_bytes()).decode("utf-8")
        body = text[entry["body_start"] : entry["body_end"]]
        (folder / Path(entry["file"]).name.removesuffix(".gz")).write_text(body, encoding="utf-8")


def describe_books(work: Path, tokenizer: Path) -> dict[str, dict[str, Any]]:
    """Return SHA-256 and number of tokens of the body of each book."""
    encoder = TextEncoder(load_text_tokenizer(str(tokenizer)))
    return {
        path.relative_to(work).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "tokens": len(encoder.encode_batch([path.read_text(encoding="utf-8")])[0]),
        }
        for part in ("train", "test")
        for path in sorted((work / part).iterdir())
    }


class Commands:
    """Runs commands of the package and keeps them as a reader would type them."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.said: list[str] = []
        self._places = places

    def run(self, *arguments: str, skip: bool = False) -> Any:
        said = "metatokens " + " ".join(arguments)
        self.said.append(said)
        if skip:
            return None
        print(said, file=sys.stderr, flush=True)
        real = [self._fill(argument) for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "metatokens.cli", *real, "--json"], stdout=subprocess.PIPE, check=True
        )
        return json.loads(done.stdout)

    def _fill(self, argument: str) -> str:
        for name, path in self._places.items():
            if argument == name or argument.startswith(f"{name}/"):
                return str(path) + argument.removeprefix(name)
        return argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with manifest.json and the packed books")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the GPT-2 BPE")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-tokens", type=int, default=3_200_000, help="text tokens that each model sees")
    parser.add_argument("--test-books", type=int, default=10)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of the training")
    options = parser.parse_args()

    commands = Commands({"WORK": options.work, "GPT2": options.tokenizer})
    cut_bodies(options.books, options.work, options.test_books)
    done_already = (options.work / "tokens" / "manifest.json").exists()
    prepare = ("prepare", "WORK/train", "--out", "WORK/tokens", "--tokenizer", "GPT2", "--validation-fraction", "0.02")
    commands.run(*prepare, skip=done_already)
    training, scores = {}, {}
    for arm in ("plain", "meta"):
        where = ["--out", f"WORK/runs/{arm}", "--data.path", "WORK/tokens"]
        training[arm] = commands.run(
            *("pretrain", f"tiny/{arm}", *where),
            *("--training.duration.tokens", str(options.text_tokens), "--training.precision", options.precision),
        )
    for arm, injection, unit in SCORED:
        scores[f"{arm}/{injection}/{unit}"] = commands.run(
            *("perplexity", f"WORK/runs/{arm}", "WORK/test", "--window", str(WINDOW), "--window-unit", unit),
            *("--stride", str(STRIDE), "--injection", injection, "--ratio", str(RATIO)),
            *("--max-tokens", str(MAX_TOKENS_A_BOOK)),
        )
    plain = scores["plain/none/text"]
    report = {
        "question": "perplexity per text token of PG-19 test books, equal text tokens in training, and in every window "
        "equal text tokens (text) or equal positions (positions)",
        "command": "python benchmarks/books_perplexity.py --books BOOKS --tokenizer GPT2 --work WORK --out ...",
        "commands": commands.said,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "training": {arm: {key: result[key] for key in TRAINING_KEYS} for arm, result in training.items()},
        "books": describe_books(options.work, options.tokenizer),
        "difference_from_plain_nats_per_token": {
            name: {
                "non_overlapping": difference(score, plain, "nats"),
                "sliding": difference(score, plain, "sliding_nats"),
            }
            for name, score in scores.items()
            if score is not plain
        },
        "scores": scores,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def difference(score: dict[str, Any], plain: dict[str, Any], key: str) -> Any:
    """Return the difference of the mean losses over the same books, with its interval over books."""
    assert [d["name"] for d in score["documents"]] == [d["name"] for d in plain["documents"]]
    nats = [[document[key] for document in result["documents"]] for result in (score, plain)]
    tokens = [document["text_tokens"] for document in plain["documents"]]
    return asdict(bootstrap_paired_ratio(*nats, tokens, seed=0))


if __name__ == "__main__":
    main()
