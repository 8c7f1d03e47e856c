"""`metatokens plan`: what a pre-training run takes on GPUs that need not be here."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from metatokens.cli.arguments import add_overrides, add_verb, at_least, finite_number
from metatokens.cli.output import announce, emit

if TYPE_CHECKING:
    from metatokens.training.costs import Memory, RunCost


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "plan", _run, "memory, time, money and disk of a pre-training run on given GPUs")
    parser.add_argument("preset", help="name of a pre-training preset (see `metatokens info --presets`) or a YAML file")
    parser.add_argument("--gpus", type=at_least(1), default=1, help="number of GPUs, one process each")
    parser.add_argument("--gpu", default="h100", help="kind of GPU, such as a100-80gb, h100, h200, rtx-4090")
    parser.add_argument(
        "--utilisation", type=_positive_share, help="share of the GPU's peak that training reaches: an assumption, 0.4"
    )
    parser.add_argument("--price", type=finite_number, help="dollars per GPU-hour: an assumption, 2.0")
    parser.add_argument("--text-vocab-size", type=at_least(1), default=50_257, help="size of the text vocabulary")
    add_overrides(parser, "metatokens.config.schema:PretrainConfig")


def _positive_share(text: str) -> float:
    if not 0 < finite_number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def _run(options: argparse.Namespace) -> int:
    from metatokens.config.loading import check_kind_of_run, load_preset

    check_kind_of_run(options.preset, "pretrain")
    config = load_preset(options.preset, options.overrides)
    announce(options, f"planning {options.preset}")
    from metatokens.report.console import show_table
    from metatokens.training.costs import plan_run

    assumptions = {"utilisation": options.utilisation, "dollars_per_gpu_hour": options.price}
    cost = plan_run(
        config,
        num_gpus=options.gpus,
        gpu=options.gpu,
        text_vocab_size=options.text_vocab_size,
        **{name: value for name, value in assumptions.items() if value is not None},
    )
    title = f"{options.preset} on {options.gpus} x {options.gpu}"
    return emit(options, asdict(cost), lambda: show_table(title, _rows(cost)))


def _rows(cost: "RunCost") -> dict[str, str]:
    """Write the cost for people."""
    more = cost.flops_per_text_token / cost.plain_flops_per_text_token - 1
    return {
        "parameters": f"{cost.parameters / 1e6:,.1f}M",
        "operations per text token": f"{cost.flops_per_text_token / 1e9:.2f}G, {more:+.1%} beside the plain model",
        "memory of a process, DDP": _of_memory(cost.memory_ddp, cost),
        "memory of a process, FSDP2": _of_memory(cost.memory_fsdp2, cost),
        "largest micro-batch": ", ".join(f"{name} {rows}" for name, rows in cost.largest_micro_batch.items()),
        "steps": f"{cost.steps:,} of {cost.step_seconds:.2f} s",
        "text tokens": f"{cost.text_tokens / 1e9:,.2f}B",
        "time": f"{cost.hours / 24:,.1f} days, if GPUs reach {cost.utilisation:.0%} of their peak",
        "money": f"${cost.dollars:,.0f}: {cost.gpu_hours:,.0f} GPU-hours at ${cost.dollars_per_gpu_hour:.2f}",
        "disk": f"tokens {_gigabytes(cost.shard_bytes)}, checkpoints {_gigabytes(cost.checkpoint_bytes)}",
    }


def _of_memory(memory: "Memory", cost: "RunCost") -> str:
    parts = {name: size for name, size in asdict(memory).items() if size}
    listed = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
    return f"{_gigabytes(memory.total)} of {_gigabytes(cost.gpu_memory_bytes)}: {listed}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
