"""What does it cost to measure attention, beside storing it? A 152M model, k = 0.1, every layer, head and query.

The ways, each in a process of its own, so that its peak memory is its own, and all in turns, round by round:

    forward    the model alone, without logits and cache: what every other way contains
    sampled    `row_statistics` of 512 sampled queries, and of all in meta-attention
    blocks     the same of all queries
    two_runs   `attention_effects` of 512 sampled queries: with the embedding and without, and the theorem's audit
    stored     all attention weights kept (`output_attentions`), then entropy and meta mass, where memory allows

Seconds per 1,000 tokens are those of the processor, which a machine shared with other work leaves alone; `more` is what
a way takes beside the forward pass.

    python benchmarks/analysis.py --threads 1 --out benchmarks/results/analysis_cpu.json
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from metatokens.analysis.attention.rows import StratifiedQueries, row_statistics
from metatokens.analysis.attention.sharpening import attention_effects
from metatokens.analysis.inputs.documents import Document
from metatokens.config.schema import ModelConfig, UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.lens import Lens
from metatokens.lens.lens import AttentionCall
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM

TEXT_VOCABULARY = 50_257
META_RATIO = 0.1
QUERIES = StratifiedQueries(512)
WAYS = ("forward", "sampled", "blocks", "two_runs", "stored")
FLOAT_BYTES = 4
ROOM = 1.3  # measured at 4,096 tokens: 1.21 times the weights, model and all
WEIGHTS_SCALE = 3.0  # makes rows of freshly drawn weights as sharp as a trained model's: a few nats


def build(length: int, way: str) -> MetaTokenForCausalLM:
    torch.manual_seed(0)
    shape = ModelConfig(position_encoding="rope", max_position_embeddings=length)
    config = MetaTokenConfig(**shape.to_hf(TEXT_VOCABULARY, eos_token_id=TEXT_VOCABULARY - 1))
    model = MetaTokenForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(WEIGHTS_SCALE)
            block.self_attn.k_proj.weight.mul_(WEIGHTS_SCALE)
    model.set_attn_implementation("eager" if way == "stored" else "sdpa")
    return model


def make_ids(length: int) -> Tensor:
    """Return (1, length) ids, a tenth of them meta-tokens, whose id is above those of all text."""
    injection = UniformInjection(ratio=META_RATIO)
    num_text = length - injection.num_meta(length)
    text = torch.randint(TEXT_VOCABULARY, (1, num_text + 1), generator=torch.Generator().manual_seed(1))
    positions = sample_meta_positions(injection, sample_ids=np.arange(1), block_size=length, seed=0, epoch=0)
    batch = inject_meta_tokens(text.numpy(), positions, meta_token_id=TEXT_VOCABULARY, loss_policy="skip")
    ids: Tensor = batch.to_model_inputs()["input_ids"]
    return ids


def run_forward(lens: Lens, ids: Tensor, _: Tensor) -> None:
    lens.run(ids)


def run_sampled(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    return mean_entropy(lens, ids, is_meta, QUERIES.draw(ids.shape[1]))


def run_blocks(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    return mean_entropy(lens, ids, is_meta)


def mean_entropy(lens: Lens, ids: Tensor, is_meta: Tensor, rows: Tensor | None = None) -> float:
    entropies = []

    def look(call: AttentionCall) -> None:
        if call.branch == "attn":
            entropies.append(row_statistics(call, is_meta=is_meta, rows=rows).entropy)
        else:  # whose keys are all meta-tokens
            row_statistics(call, is_meta=call.columns >= 0)

    with lens.observe(look):
        lens.run(ids)
    return float(torch.stack(entropies).mean())


def run_two_runs(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    document = Document("random tokens", ids, is_meta)
    return float(attention_effects(lens, [document], queries=QUERIES)["entropy"].mean())


def run_stored(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    options = {"output_attentions": True, "output_meta_attentions": True, "use_cache": False, "logits_to_keep": 1}
    output = lens(ids, **options)
    entropies = [torch.special.entr(weights).sum(-1) for weights in output.attentions]
    for weights in output.attentions:
        (weights * is_meta[:, None, None]).sum(-1)
    for weights in output.meta_attentions:
        torch.special.entr(weights).sum(-1)
    return float(torch.stack(entropies).mean())


RUNS: dict[str, Callable[[Lens, Tensor, Tensor], float | None]] = {way: globals()[f"run_{way}"] for way in WAYS}


def measure_here(way: str, length: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    lens = Lens(build(length, way))
    warm = make_ids(128)
    RUNS[way](lens, warm, warm == TEXT_VOCABULARY)
    ids = make_ids(length)
    started, used = time.perf_counter(), time.process_time()
    entropy = RUNS[way](lens, ids, ids == TEXT_VOCABULARY)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "mean_entropy": entropy,
    }


def measure_apart(way: str, length: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", way, "--lengths", str(length), "--threads", str(threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout)
    print(json.dumps({"length": length, "way": way, **measured}), file=sys.stderr)
    return measured


def weights_bytes(length: int) -> int:
    """Return the size of all attention weights of the model."""
    shape = ModelConfig()
    num_meta = UniformInjection(ratio=META_RATIO).num_meta(length)
    return shape.num_hidden_layers * shape.num_attention_heads * (length**2 + num_meta**2) * FLOAT_BYTES


def available_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure_length(length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    fits = weights_bytes(length) * ROOM < available_bytes()
    ways = [way for way in options.ways if way != "stored" or fits]
    rounds = [{way: measure_apart(way, length, options.threads) for way in ways} for _ in range(options.rounds)]
    results = []
    for way in options.ways:
        if way not in ways:
            size = round(weights_bytes(length) / 1e9, 1)
            results.append({"length": length, "way": way, "not_run": f"the weights alone are {size} GB"})
            continue
        runs = [one[way] for one in rounds]
        median = {
            name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds", "peak_bytes")
        }
        result = {
            "length": length,
            "way": way,
            "seconds": round(median["seconds"], 2),
            "cpu_seconds": round(median["cpu_seconds"], 2),
            "cpu_seconds_per_1k_tokens": round(median["cpu_seconds"] / length * 1000, 3),
            "peak_megabytes": round(median["peak_bytes"] / 1e6),
            "mean_entropy": runs[0]["mean_entropy"],
        }
        if way != "forward" and "forward" in ways:
            # of one round each, since what the machine gives changes from round to round
            more = [one[way]["cpu_seconds"] - one["forward"]["cpu_seconds"] for one in rounds]
            more_bytes = [one[way]["peak_bytes"] - one["forward"]["peak_bytes"] for one in rounds]
            result["more_cpu_seconds_per_1k_tokens"] = round(statistics.median(more) / length * 1000, 3)
            result["more_megabytes_per_1k_tokens"] = round(statistics.median(more_bytes) / 1e6 / length * 1000, 1)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(options.child, options.lengths[0], options.threads)))
        return
    report = {
        "command": "python " + " ".join(sys.argv),
        "meta_ratio": META_RATIO,
        "queries": QUERIES.count,
        "device": platform.machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": [result for length in options.lengths for result in measure_length(length, options)],
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
