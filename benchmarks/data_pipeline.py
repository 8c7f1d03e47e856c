"""How fast is the data pipeline on one core: injection, `prepare`, and the loader?

    python benchmarks/data_pipeline.py --tokenizer gpt2 --text corpus/ --out benchmarks/results/data_pipeline.json

Injection is measured at the paper's block size and ratio. Each figure is the median of several runs on one core,
the one that the process is pinned to; prepare is one run over the whole text, verification of the result apart.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from metatokens.config.schema import PunctuationInjection, UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions

BLOCK_SIZE, BATCH_BLOCKS, RATIO = 1024, 64, 0.1  # paper section 4.1; a batch that stays in cache
VOCAB_SIZE = 50257
REPEATS, CALLS = 7, 20


def seconds_per_call(function: Callable[[], object]) -> float:
    """Return the median over repeats of the mean over calls."""
    function()
    means = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        means.append((time.perf_counter() - started) / CALLS)
    return statistics.median(means)


def measure_injection() -> dict[str, float]:
    injection = UniformInjection(ratio=RATIO)
    num_text = BLOCK_SIZE - injection.num_meta(BLOCK_SIZE)
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB_SIZE, (BATCH_BLOCKS, num_text + 1))
    ends_clause = rng.random(VOCAB_SIZE) < 0.1
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

    meta_positions = positions()

    def inject(layout: np.ndarray) -> object:
        return inject_meta_tokens(text, layout, meta_token_id=VOCAB_SIZE, loss_policy="skip")

    num_positions = BATCH_BLOCKS * BLOCK_SIZE / 1e6
    return {
        "positions_uniform": num_positions / seconds_per_call(positions),
        "positions_punctuation": num_positions / seconds_per_call(lambda: positions(PunctuationInjection(ratio=RATIO))),
        "inject": num_positions / seconds_per_call(lambda: inject(meta_positions)),
        "positions_uniform_and_inject": num_positions / seconds_per_call(lambda: inject(positions())),
    }


def measure_prepare(tokenizer: str, text: str, out: Path) -> dict[str, float]:
    seen = {}

    def progress(num_bytes: int, num_tokens: int) -> None:
        seen.update(text_bytes=num_bytes, tokens=num_tokens)

    started = time.perf_counter()
    prepare(
        text,
        out,
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE,
        validation_fraction=0.05,
        shard_tokens=1 << 28,
        options=SourceOptions(),
        progress=progress,
    )
    seconds = time.perf_counter() - started
    return {**seen, "seconds": seconds, "megabytes_per_second": seen["text_bytes"] / seconds / 1e6}


def measure_loader(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    dataset = TokenDataset.open(folder, verify="full")
    open_seconds = time.perf_counter() - started
    injection = UniformInjection(ratio=RATIO)
    loader = BatchLoader(
        TokenBlocks(dataset, "train", BLOCK_SIZE - injection.num_meta(BLOCK_SIZE)),
        injection=injection,
        block_size=BLOCK_SIZE,
        batch_blocks=BATCH_BLOCKS,
        seed=0,
        meta_token_id=dataset.vocab_size,
        loss_policy="skip",
    )
    steps = iter(range(REPEATS * CALLS + 1))
    seconds = seconds_per_call(lambda: loader.batch_at(next(steps)))
    num_bytes = sum(shard.bytes for shard in dataset.manifest.shards)
    return {
        "blocks": len(loader.blocks),
        "blocks_per_second": BATCH_BLOCKS / seconds,
        "million_positions_per_second": BATCH_BLOCKS * BLOCK_SIZE / seconds / 1e6,
        "verify_full_megabytes_per_second": num_bytes / open_seconds / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or id of a tokenizer")
    parser.add_argument("--text", required=True, help="file or folder of text")
    parser.add_argument("--out", required=True, type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "question": "throughput of the data pipeline on one core",
            "command": "python benchmarks/data_pipeline.py --tokenizer DIR --text DIR --out FILE",
            "machine": {
                "cores": len(cores),
                "cores_used": 1,
                "architecture": platform.machine(),
                "python": platform.python_version(),
                **{package: version(package) for package in ("numpy", "tiktoken", "tokenizers")},
            },
            "settings": {"block_size": BLOCK_SIZE, "batch_blocks": BATCH_BLOCKS, "ratio": RATIO, "loss_policy": "skip"},
            "injection_million_positions_per_second": measure_injection(),
            "prepare": measure_prepare(arguments.tokenizer, arguments.text, Path(folder, "tokens")),
            "loader": measure_loader(Path(folder, "tokens")),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
