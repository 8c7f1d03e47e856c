"""How fast do presets train here? Text tokens a second and model FLOPs utilisation, the presets taking turns.

A step is forward, backward, clipping and AdamW on random text, as the training loop does it. Operations are those of
`metatokens.model.accounting`: causal attention counts the pairs that causality allows, meta-attention its packed rows.

    python benchmarks/training_throughput.py paper/gpt2-124m paper/meta-rope-152m --device cuda --precision bfloat16 \
        --compile --rows 32 --peak-tflops 989 --out benchmarks/results/training_throughput_gpu.json
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from metatokens.bench.turns import take_turns, timed
from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.model import MetaTokenConfig
from metatokens.model.accounting import training_flops
from metatokens.training.initialization import build_model
from metatokens.training.optimizer import build_optimizer

TEXT_VOCABULARY = 50_257


def training_step(config: PretrainConfig, options: argparse.Namespace) -> Callable[[], None]:
    """Return one optimizer step of a preset on a fixed batch."""
    model = build_model(config.model, text_vocab_size=TEXT_VOCABULARY, eos_token_id=TEXT_VOCABULARY - 1, seed=0)
    model.to(options.device)
    optimizer = build_optimizer(model, config.optimizer)
    step_model = torch.compile(model) if options.compile else model
    text = np.random.Generator(np.random.PCG64(0)).integers(
        TEXT_VOCABULARY, size=(options.rows, config.text_tokens_per_block + 1)
    )
    positions = sample_meta_positions(
        config.injection, sample_ids=np.arange(options.rows), block_size=config.data.block_size, seed=0, epoch=0
    )
    batch = inject_meta_tokens(text, positions, meta_token_id=TEXT_VOCABULARY, loss_policy=config.model.loss_policy)
    inputs = batch.to_model_inputs(device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = step_model(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=1, help="blocks of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, help="the device's dense peak; without it no utilisation")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    configs = {name: load_preset(name) for name in options.presets}
    steps = {name: training_step(config, options) for name, config in configs.items()}
    turns = {name: lambda step=step: {"step": timed(step)} for name, step in steps.items()}
    rounds = take_turns(turns, rounds=options.rounds, warmup=options.warmup)
    results = {}
    for name, config in configs.items():
        median = statistics.median(rounds[name]["step"])
        block, text = config.data.block_size, config.text_tokens_per_block
        hf_config = MetaTokenConfig(**config.model.to_hf(TEXT_VOCABULARY, TEXT_VOCABULARY - 1))
        flops = options.rows * training_flops(hf_config, num_positions=block, num_meta=block - text)
        results[name] = {
            "seconds_per_step": round(median, 5),
            "text_tokens_per_second": round(options.rows * text / median),
            "positions_per_second": round(options.rows * block / median),
            "tflops_per_second": round(flops / median / 1e12, 3),
            "model_flops_utilisation": options.peak_tflops and round(flops / median / 1e12 / options.peak_tflops, 4),
        }
    report = {
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
    }
    text_report = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text_report)
    print(text_report, end="")


if __name__ == "__main__":
    main()
