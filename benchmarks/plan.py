"""Is the memory that `metatokens plan` computes what training takes? Real processes, real peaks.

Each shape is trained for a few steps in a process of its own on the CPU. Its peak resident memory, less that of a
process that trains a model of almost no size, stands beside the computed sum.

    python benchmarks/plan.py --out benchmarks/results/plan_cpu.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "small batch": {
        "model": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
        "rows": 2,
        "accumulate": 1,
    },
    "large batch": {
        "model": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
        "rows": 8,
        "accumulate": 1,
    },
    "accumulated": {
        "model": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        "rows": 8,
        "accumulate": 4,
    },
    "checkpointed": {
        "model": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
        "rows": 8,
        "accumulate": 1,
        "gradient_checkpointing": True,
    },
    "plain": {
        "model": {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "meta_attention_layers": "none",
        },
        "rows": 8,
        "accumulate": 1,
        "ratio": 0.0,
    },
    "bfloat16": {
        "model": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        "rows": 4,
        "accumulate": 1,
        "precision": "bfloat16",
    },
}
# what the framework takes, with everything imported that a step imports
NOTHING: dict[str, Any] = {
    "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "rows": 1,
    "accumulate": 1,
}
# glibc would keep freed tensors for later ones, and their fragments would count as memory in use
EXACT_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
BLOCK_SIZE = 256
VOCABULARY = 8_192
STEPS = 2


def make_config(shape: dict[str, Any]) -> Any:
    from metatokens.config.schema import PretrainConfig

    return PretrainConfig.model_validate(
        {
            "model": {"max_position_embeddings": BLOCK_SIZE, **shape["model"]},
            "data": {"block_size": BLOCK_SIZE},
            "injection": {"kind": "uniform", "ratio": shape.get("ratio", 0.1)},
            "training": {
                "batch_blocks": shape["rows"] * shape["accumulate"],
                "micro_batch_blocks": shape["rows"],
                "gradient_checkpointing": shape.get("gradient_checkpointing", False),
                "precision": shape.get("precision", "float32"),
                "duration": {"kind": "steps", "steps": STEPS},
                "deterministic": False,
            },
            "schedule": {"kind": "cosine", "warmup_steps": 0},
        }
    )


def peak_megabytes(shape: dict[str, Any]) -> float:
    """Return the peak resident memory of a process that trains the shape."""
    command = [sys.executable, __file__, "--train", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | EXACT_ALLOCATION)
    return float(done.stdout.split()[-1])


def train(shape: dict[str, Any]) -> None:
    """Take the steps of the training loop, as `metatokens.training.loop` does, and print the peak in MB."""
    import resource

    import torch

    from metatokens.baselines.building import build_config
    from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
    from metatokens.model import MetaTokenForCausalLM
    from metatokens.training.optimizer import build_optimizer

    config = make_config(shape)
    model = MetaTokenForCausalLM(build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0))
    optimizer = build_optimizer(model, config.optimizer)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    for step in range(STEPS):
        for index in range(shape["accumulate"]):
            sample_ids = np.arange(shape["rows"]) + index * shape["rows"]
            positions = sample_meta_positions(
                config.injection, sample_ids=sample_ids, block_size=BLOCK_SIZE, seed=0, epoch=step
            )
            text = np.random.default_rng(step).integers(
                0, VOCABULARY, (shape["rows"], config.text_tokens_per_block + 1)
            )
            batch = inject_meta_tokens(text, positions, meta_token_id=VOCABULARY, loss_policy="skip")
            with torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"):
                loss = model(**batch.to_model_inputs(device="cpu"), use_cache=False, num_items_in_batch=1000).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.train:
        return train(options.train)
    import torch

    from metatokens.baselines.building import build_config
    from metatokens.training.costs import count_memory

    framework = peak_megabytes(NOTHING)
    rows = []
    for name, shape in SHAPES.items():
        config = make_config(shape)
        model = build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0)
        memory = count_memory(config, model, parallel="ddp", num_gpus=1, rows=shape["rows"])
        measured = peak_megabytes(shape) - framework
        row = {
            "shape": name,
            **shape,
            "measured_megabytes": round(measured, 1),
            "computed_megabytes": round(memory.total / 1e6, 1),
            "computed_over_measured": round(memory.total / 1e6 / measured, 3),
            "parts_megabytes": {part: round(value / 1e6, 1) for part, value in asdict(memory).items()},
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "block_size": BLOCK_SIZE,
        "vocabulary": VOCABULARY,
        "framework_megabytes": round(framework, 1),
        "results": rows,
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
