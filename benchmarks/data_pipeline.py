"""How fast is the data pipeline: tokenising, `prepare`, injection and the loader, on one core and on all?

    python benchmarks/data_pipeline.py --tokenizer gpt2 --text corpus/ --out benchmarks/results/data_pipeline.json

Contenders take turns, round by round; a figure is the median of its rounds. On one core, the process is pinned to it.
Every figure stands beside the rate at which that core copies memory, the bound of anything that moves bytes.
`prepare` loads and checks the tokenizer first, which does not grow with the text: its rate is given with and without.
Injection and loader are measured at the paper's block size and ratio.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from metatokens.bench.turns import time_in_turns
from metatokens.config.schema import PunctuationInjection, UniformInjection
from metatokens.data.adopt import adopt
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.data.tokenizer import TextEncoder, load_text_tokenizer

BLOCK_SIZE, BATCH_BLOCKS, RATIO = 1024, 64, 0.1  # paper section 4.1; a batch that stays in cache
COPIED_BYTES = 1 << 28  # more than any cache holds
CALLS = 20  # of what takes under a millisecond


@contextmanager
def pinned_to(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def repeat(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


def rates(tasks: Mapping[str, Callable[[], object]], amount: float, rounds: int) -> dict[str, float]:
    """Run the tasks in turns, and return how much of `amount` each does in a second."""
    seconds = time_in_turns(tasks, rounds=rounds)
    return {name: amount / statistics.median(of_task) for name, of_task in seconds.items()}


def measure_copy(rounds: int) -> float:
    """Return the bytes that a core copies in a second."""
    source, target = np.ones(COPIED_BYTES, np.uint8), np.zeros(COPIED_BYTES, np.uint8)
    return rates({"copy": partial(np.copyto, target, source)}, COPIED_BYTES, rounds)["copy"]


def measure_tokenising(name: str, source: str, num_bytes: int, rounds: int) -> dict[str, float]:
    """Encode the beginning of the text with our encoder and with `tokenizers`, on one core."""
    tokenizer, texts, taken = load_text_tokenizer(name), [], 0
    for document in iterate_documents(source):
        texts.append(document.text)
        taken += len(document.text.encode())
        if taken >= num_bytes:
            break
    encoder, plain = TextEncoder(tokenizer, threads=1), Tokenizer.from_str(tokenizer.to_str())
    found = rates(
        {
            "ours": partial(encoder.encode_batch, texts),
            "tokenizers": partial(plain.encode_batch_fast, texts, add_special_tokens=False),
        },
        taken / 1e6,
        rounds,
    )
    return {"text_bytes": taken, **found, "ours_over_tokenizers": found["ours"] / found["tokenizers"]}


def prepare_once(tokenizer: str, source: str, out: Path, *, jobs: int = 1) -> dict[str, float]:
    """Prepare the text once, and tell how long it took with and without loading and checking the tokenizer."""
    seen: dict[str, float] = {}
    started = time.perf_counter()
    prepare(
        source,
        out,
        tokenizer=tokenizer,
        vocab_size=0,
        validation_fraction=0,
        shard_tokens=1 << 28,
        options=SourceOptions(),
        jobs=jobs,
        progress=lambda num_bytes, num_tokens: seen.update(text_bytes=num_bytes, tokens=num_tokens),
        say=lambda _: seen.setdefault("ready", time.perf_counter()),
    )
    seconds, start_seconds = time.perf_counter() - started, seen.pop("ready") - started
    return {
        **seen,
        "seconds": seconds,
        "start_seconds": start_seconds,
        "megabytes_per_second": seen["text_bytes"] / seconds / 1e6,
        "megabytes_per_second_after_start": seen["text_bytes"] / (seconds - start_seconds) / 1e6,
    }


def measure_prepare(tokenizer: str, source: str, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Prepare the text on one core, on all by threads, and on all by processes, in turns."""
    cores = os.sched_getaffinity(0)
    ways = {"one_core": ({max(cores)}, 1), "threads": (cores, 1), "processes": (cores, len(cores))}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, (allowed, jobs) in ways.items():
            with pinned_to(allowed):
                runs[way].append(prepare_once(tokenizer, source, folder / f"{way}-{number}", jobs=jobs))
    return {
        way: {key: statistics.median(run[key] for run in of_way) for key in of_way[0]} for way, of_way in runs.items()
    }


def measure_injection(vocab_size: int, rounds: int) -> dict[str, float]:
    injection = UniformInjection(ratio=RATIO)
    num_text = BLOCK_SIZE - injection.num_meta(BLOCK_SIZE)
    rng = np.random.default_rng(0)
    text = rng.integers(0, vocab_size, (BATCH_BLOCKS, num_text + 1))
    ends_clause = rng.random(vocab_size) < 0.1
    sample_ids = np.arange(BATCH_BLOCKS)

    def positions(policy: UniformInjection | PunctuationInjection = injection) -> np.ndarray:
        return sample_meta_positions(
            policy,
            sample_ids=sample_ids,
            block_size=BLOCK_SIZE,
            seed=0,
            epoch=0,
            text=text,
            ends_clause=ends_clause,
        )

    def inject(layout: np.ndarray) -> object:
        return inject_meta_tokens(text, layout, meta_token_id=vocab_size, loss_policy="skip")

    meta_positions = positions()
    tasks = {
        "positions_uniform": positions,
        "positions_punctuation": partial(positions, PunctuationInjection(ratio=RATIO)),
        "inject": partial(inject, meta_positions),
        "positions_uniform_and_inject": lambda: inject(positions()),
    }
    repeated = {name: partial(repeat, task) for name, task in tasks.items()}
    return rates(repeated, CALLS * BATCH_BLOCKS * BLOCK_SIZE / 1e6, rounds)


def measure_loader(folder: Path, rounds: int) -> dict[str, float]:
    injection = UniformInjection(ratio=RATIO)
    with TokenDataset.open(folder) as dataset:
        loader = BatchLoader(
            TokenBlocks(dataset, "train", BLOCK_SIZE - injection.num_meta(BLOCK_SIZE)),
            injection=injection,
            block_size=BLOCK_SIZE,
            batch_blocks=BATCH_BLOCKS,
            seed=0,
            meta_token_id=dataset.vocab_size,
            loss_policy="skip",
        )
        steps = count()
        blocks = rates({"loader": partial(repeat, lambda: loader.batch_at(next(steps)))}, CALLS * BATCH_BLOCKS, rounds)[
            "loader"
        ]
        return {
            "blocks": len(loader.blocks),
            "blocks_per_second": blocks,
            "million_positions_per_second": blocks * BLOCK_SIZE / 1e6,
            "million_text_tokens_per_second": blocks * loader.blocks.text_tokens / 1e6,
        }


def measure_files(folder: Path, rounds: int) -> dict[str, float]:
    """Verify a dataset, and adopt its shards, in turns; megabytes of tokens per second."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.ds"))
    numbers = count()
    return rates(
        {
            "verify": lambda: TokenDataset.open(folder).close(),
            "adopt": lambda: adopt(
                [folder], folder.with_name(f"adopted-{next(numbers)}"), tokenizer=str(folder / "tokenizer.json")
            ),
        },
        num_bytes / 1e6,
        rounds,
    )


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    rounds, source, tokenizer = arguments.rounds, arguments.text, arguments.tokenizer
    vocab_size = TextEncoder(load_text_tokenizer(tokenizer)).vocab_size
    prepared = measure_prepare(tokenizer, source, folder, rounds)
    with pinned_to({max(cores)}):
        copy = measure_copy(rounds)
        tokenising = measure_tokenising(tokenizer, source, arguments.megabytes * 10**6, rounds)
        injection = measure_injection(vocab_size, rounds)
        loader = measure_loader(folder / "one_core-0", rounds)
        files = measure_files(folder / "one_core-0", rounds)
    # an id of a block is read as 2 or 4 bytes, and written as 8 to the inputs and 8 to the targets
    written = 2 * np.dtype(np.int64).itemsize
    return {
        "copy_gigabytes_per_second": copy / 1e9,
        "tokenising_megabytes_per_second": tokenising,
        "prepare": prepared["one_core"],
        "prepare_on_all_cores": {way: prepared[way] for way in ("threads", "processes")},
        "injection_million_positions_per_second": injection,
        "loader": loader,
        "files_megabytes_per_second": files,
        "share_of_copy_rate": {
            "tokenising": tokenising["ours"] * 1e6 / copy,
            "injection": injection["positions_uniform_and_inject"] * 1e6 * written / copy,
            "loader": loader["million_positions_per_second"] * 1e6 * written / copy,
            "verify": files["verify"] * 1e6 / copy,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or id of a tokenizer")
    parser.add_argument("--text", required=True, help="file or folder of text")
    parser.add_argument("--megabytes", type=int, default=16, help="text that is encoded without being written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", required=True, type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not bound by the core of this process
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "question": "throughput of the data pipeline on one core and on all",
            "command": "python benchmarks/data_pipeline.py --tokenizer DIR --text DIR --out FILE",
            "machine": {
                "cores": len(os.sched_getaffinity(0)),
                "architecture": platform.machine(),
                "python": platform.python_version(),
                **{package: version(package) for package in ("numpy", "tiktoken", "tokenizers")},
            },
            "settings": {
                "block_size": BLOCK_SIZE,
                "batch_blocks": BATCH_BLOCKS,
                "ratio": RATIO,
                "loss_policy": "skip",
                "rounds": arguments.rounds,
            },
            **measure(arguments, Path(folder)),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
