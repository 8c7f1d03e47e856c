"""Is the memory that `metatokens plan` computes what training takes? Real processes, real peaks.

Each shape is trained for a few steps in a process of its own on the CPU. Its peak resident memory, less that of a
process that trains a model of almost no size, stands beside the computed sum. FSDP2 is trained by two processes, which
gloo connects; the larger of their peaks counts.

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
    "fsdp2": {
        "model": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
        "rows": 2,
        "accumulate": 1,
        "processes": 2,
    },
    "fsdp2 accumulated": {
        "model": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        "rows": 4,
        "accumulate": 2,
        "processes": 2,
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
PEAK = "peak_megabytes "


def make_config(shape: dict[str, Any]) -> Any:
    from metatokens.config.schema import PretrainConfig

    return PretrainConfig.model_validate(
        {
            "model": {"max_position_embeddings": BLOCK_SIZE, **shape["model"]},
            "data": {"block_size": BLOCK_SIZE},
            "injection": {"kind": "uniform", "ratio": shape.get("ratio", 0.1)},
            "training": {
                "batch_blocks": shape["rows"] * shape["accumulate"] * shape.get("processes", 1),
                "micro_batch_blocks": shape["rows"],
                "gradient_checkpointing": shape.get("gradient_checkpointing", False),
                "precision": shape.get("precision", "float32"),
                "duration": {"kind": "steps", "steps": STEPS},
                "deterministic": False,
                "parallel": {"kind": "fsdp2" if "processes" in shape else "ddp"},
            },
            "schedule": {"kind": "cosine", "warmup_steps": 0},
        }
    )


def peak_megabytes(shape: dict[str, Any]) -> float:
    """Return the peak resident memory of a process that trains the shape; of several, the largest."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(shape.get("processes", 1))]
    command = [sys.executable, *(launcher if "processes" in shape else []), __file__, "--train", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | EXACT_ALLOCATION)
    return max(float(line.removeprefix(PEAK)) for line in done.stdout.splitlines() if line.startswith(PEAK))


def train(shape: dict[str, Any]) -> None:
    """Take the steps of the training loop, as `metatokens.training.loop` does, and print the peak in MB."""
    import resource

    from metatokens.training.distributed import join_processes
    from metatokens.training.parallel import share_model

    config = make_config(shape)
    with join_processes(config.training) as processes:
        shared = share_model(config.training, processes)
        take_steps(config, shape, shared)
        shared.release()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    sys.stdout.write(f"{PEAK}{peak}\n")  # in one piece, since processes share the output
    sys.stdout.flush()


def take_steps(config: Any, shape: dict[str, Any], shared: Any) -> None:
    import torch

    from metatokens.baselines.building import build_config
    from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
    from metatokens.model import MetaTokenForCausalLM
    from metatokens.training.optimizer import build_optimizer

    model = MetaTokenForCausalLM(build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0))
    shared.place(model)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.train:
        return train(options.train)
    import torch

    from metatokens.baselines.building import build_config
    from metatokens.training.costs import count_memory

    framework: dict[int, float] = {}
    rows = []
    for name in options.shapes:
        shape = SHAPES[name]
        number = shape.get("processes", 1)
        if number not in framework:
            framework[number] = peak_megabytes(NOTHING | ({"processes": number} if number > 1 else {}))
        config = make_config(shape)
        model = build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0)
        parallel = config.training.parallel.kind
        memory = count_memory(config, model, parallel=parallel, num_gpus=number, rows=shape["rows"])
        measured = peak_megabytes(shape) - framework[number]
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
        "framework_megabytes": {str(number): round(value, 1) for number, value in framework.items()},
        "results": rows,
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
