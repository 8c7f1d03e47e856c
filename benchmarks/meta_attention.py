"""What does meta-attention cost? Plain, packed, dense and transformers' GPT-2, side by side in one run.

GPT-2-small width, k = 0.1, random tokens. The variants take turns, round by round, so that a drift of the machine's
speed hits all alike; a ratio is the median of the rounds' ratios. A step is forward, backward and AdamW. Two dense
forms:
the reference as the package keeps it, and the same mask through the fused kernel, the fairer opponent.

    python benchmarks/meta_attention.py --out benchmarks/results/meta_attention_cpu.json
    python benchmarks/meta_attention.py --device cuda --dtype bfloat16 --compile --lengths 1024 4096 --out ...
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from metatokens.config.schema import ModelConfig, UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.evaluation.speed import median_ratio, time_in_turns
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.reference import DenseReferenceBlock, DenseReferenceForCausalLM, DenseReferenceModel

TEXT_VOCABULARY = 50_257
META_RATIO = 0.1
VARIANTS = ("plain", "packed", "dense", "dense_fused", "transformers_gpt2")


class DenseFusedBlock(DenseReferenceBlock):
    """Dense meta-attention with the T x T mask given to the fused kernel."""

    mask: Tensor

    def add_meta_attention(self, hidden: Tensor, pack: Any, past_key_values: Any) -> Tensor:
        attention = self.meta_attn
        query, key, value = attention.project(self.meta_layernorm(hidden), pack.rotary)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        output = attention.o_proj(output.transpose(1, 2).flatten(2))
        return hidden + torch.where(pack.is_meta[..., None], output, 0)


class DenseFusedModel(DenseReferenceModel):
    block_class = DenseFusedBlock


class DenseFusedForCausalLM(DenseReferenceForCausalLM):
    model_class = DenseFusedModel


CLASSES = {"dense": DenseReferenceForCausalLM, "dense_fused": DenseFusedForCausalLM}


def build(variant: str, length: int) -> nn.Module:
    """Build a GPT-2-small-sized model with learned positions, so that all four differ in nothing else."""
    torch.manual_seed(0)
    shape = ModelConfig(
        position_encoding="learned",
        max_position_embeddings=length,
        meta_attention_layers="none" if variant == "plain" else "all",
    )
    config = MetaTokenConfig(**shape.to_hf(TEXT_VOCABULARY, eos_token_id=TEXT_VOCABULARY - 1))
    if variant == "transformers_gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=config.vocab_size, n_positions=length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
    return CLASSES.get(variant, MetaTokenForCausalLM)(config)


def make_batch(variant: str, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Return the keyword arguments of one forward pass; the plain models get as many positions, all of them text."""
    generator = torch.Generator().manual_seed(1)
    with_meta = variant in ("packed", "dense", "dense_fused")
    num_text = length - (UniformInjection(ratio=META_RATIO).num_meta(length) if with_meta else 0)
    text = torch.randint(TEXT_VOCABULARY, (rows, num_text + 1), generator=generator)
    if variant == "transformers_gpt2":
        return {"input_ids": text[:, :-1].to(device), "labels": text[:, :-1].to(device)}
    if not with_meta:
        return {"input_ids": text[:, :-1].to(device), "shift_labels": text[:, 1:].to(device)}
    injection = UniformInjection(ratio=META_RATIO)
    positions = sample_meta_positions(injection, sample_ids=np.arange(rows), block_size=length, seed=0, epoch=0)
    batch = inject_meta_tokens(text.numpy(), positions, meta_token_id=TEXT_VOCABULARY, loss_policy="skip")
    inputs = batch.to_model_inputs(device=device)
    if variant == "dense_fused":
        is_meta = inputs["input_ids"] == TEXT_VOCABULARY
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # each other row sees itself alone, so that none is empty; its output is dropped
        itself = torch.eye(length, dtype=torch.bool, device=device)
        DenseFusedBlock.mask = (causal & is_meta[:, None, :, None] & is_meta[:, None, None, :]) | itself
    return inputs


def make_tasks(variant: str, options: argparse.Namespace, length: int, rows: int) -> dict[str, Callable[[], Any]]:
    """Return forward, forward plus backward, and training step of one variant."""
    model = build(variant, length).to(options.device)
    decoder = model.transformer if variant == "transformers_gpt2" else model.model
    step_model, decoder = (torch.compile(module) if options.compile else module for module in (model, decoder))
    batch = make_batch(variant, rows, length, options.device)
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "meta_indices")}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16")

    @torch.no_grad()
    def forward() -> None:
        # the decoder alone: with the head, making logits would hide what differs
        with autocast:
            decoder(**inputs, use_cache=False)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = step_model(**batch, use_cache=False).loss
        loss.backward()

    def training_step() -> None:
        forward_backward()
        optimizer.step()

    return {"forward": forward, "forward_backward": forward_backward, "training_step": training_step}


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median over rounds of the ratios that matter."""
    pairs = [(variant, "plain") for variant in ("packed", "dense", "dense_fused")] + [("plain", "transformers_gpt2")]
    return {
        f"{above}/{below}": round(median_ratio(seconds, above, below), 4)
        for above, below in pairs
        if above in seconds and below in seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    results = []
    for length in options.lengths:
        rows = max(1, options.tokens // length)
        tasks = {variant: make_tasks(variant, options, length, rows) for variant in options.variants}
        for kind in ("forward", "forward_backward", "training_step"):
            turns = {name: task[kind] for name, task in tasks.items()}
            seconds = time_in_turns(turns, rounds=options.rounds, warmup=options.warmup)
            result = {
                "length": length,
                "rows": rows,
                "kind": kind,
                "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
                "ratios": ratios(seconds),
            }
            results.append(result)
            print(json.dumps(result), file=sys.stderr)
        del tasks
    report = {
        "command": "python " + " ".join(sys.argv),
        "meta_ratio": META_RATIO,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": results,
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
