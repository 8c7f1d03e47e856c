"""One command for a machine with one GPU: is everything right there, and how fast?

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny --out dry-run.json    # every task at a tiny size, without a GPU

The tasks run in the order of their worth until the time is over: checks of both attentions against float64 on the CPU;
training steps of the paper's two presets by length, mode and attention backend, with model FLOPs utilisation; what
meta-attention costs, by the ratio k; first token and decoding. The file is written after every task, so whatever ends
the command leaves what was measured. A task that fails is kept with its error, and the others go on; then the exit code
is 1. A backend whose package is missing is left out with the reason.
"""

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metatokens.bench import generation, training
from metatokens.bench.machine import MATRIX, describe_machine, make_rates_turn
from metatokens.bench.showing import plain_tree
from metatokens.bench.turns import spread, take_turns, timed
from metatokens.config.bench import GenerationBench, TrainingBench
from metatokens.config.loading import load_preset
from metatokens.config.schema import ModelConfig, PretrainConfig, UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.model import MetaTokenConfig
from metatokens.model.accounting import activation_bytes, count_parameters, training_flops
from metatokens.model.reference import DenseReferenceForCausalLM
from metatokens.training.costs import GPUS
from metatokens.training.initialization import build_model
from metatokens.training.optimizer import build_optimizer

PRESETS = ("paper/gpt2-124m", "paper/meta-rope-152m")
LENGTHS = (1024, 4096, 8192)
RATIOS = (0.05, 0.1, 0.2)
TEXT_VOCABULARY = 50_257
TOKENS = 32_768  # positions of a training step, if they fit
MEMORY_SHARE = 0.6  # of the GPU, for the training state and the activations; the loss and the kernels take more
BYTES_OF_STATE = 16  # of a parameter: weight, gradient, two moments
# relative error of logits and gradients beside float64. A gradient of queries loses most to rounding: 0.05 in
# bfloat16 on a CPU; a mask that lets in one column too many costs several times the limit
ALLOWED = {"float32": 1e-4, "bfloat16": 0.15}
TINY_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Task(NamedTuple):
    name: str
    run: Callable[[], Any]


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yield everything in the order of its worth."""
    device, tiny = options.device, options.tiny
    lengths = (64, 128) if tiny else LENGTHS
    train, bench_step = partial(measure_presets, options), partial(measure_overhead, options)
    yield Task("rates", lambda: measure_rates(options))
    for precision in ("float32", "bfloat16"):
        yield Task(f"check sdpa {precision}", partial(check, device, precision, "sdpa", compiled=False))
    yield Task("check sdpa float32 compiled", partial(check, device, "float32", "sdpa", compiled=True))
    yield Task(f"training {lengths[0]} sdpa compiled", partial(train, lengths[0], "sdpa", compiled=True))
    yield Task(f"training {lengths[0]} sdpa eager", partial(train, lengths[0], "sdpa", compiled=False))
    yield Task("overhead k=0.1 eager", partial(bench_step, 0.1, compiled=False))
    yield Task("generation batch 1", partial(measure_generation, options, 1))
    if not tiny:  # the same code with other numbers
        yield Task("overhead k=0.1 compiled", partial(bench_step, 0.1, compiled=True))
        for length in lengths[1:]:
            yield Task(f"training {length} sdpa compiled", partial(train, length, "sdpa", compiled=True))
    for length in lengths[1:]:
        yield Task(f"training {length} sdpa eager", partial(train, length, "sdpa", compiled=False))
    for ratio in RATIOS:
        if ratio != 0.1:
            yield Task(f"overhead k={ratio} eager", partial(bench_step, ratio, compiled=False))
    yield Task("generation batch 8", partial(measure_generation, options, 8))
    for attention in ("eager",) if device == "cpu" else ("flex_attention", "flash_attention_2", "eager"):
        precision = "bfloat16" if attention == "flash_attention_2" else "float32"
        yield Task(f"check {attention}", partial(check, device, precision, attention, compiled=False))
        if attention != "eager":
            for length in (lengths[0], lengths[-1]):
                yield Task(f"training {length} {attention}", partial(train, length, attention, compiled=False))


def compile_model(model: Any, device: str) -> Any:
    """Compile a model; on the CPU capture its graphs alone, since the kernels that follow would not be the GPU's."""
    return torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")


# is it right? ------------------------------------------------------------------------------------------------


def check(device: str, precision: str, attention: str, *, compiled: bool) -> dict[str, Any]:
    """Compare loss, gradients and cached logits with the dense definition in float64 on the CPU."""
    length, rows, vocabulary = 192, 2, 500
    shape = ModelConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=length)
    model = build_model(shape, text_vocab_size=vocabulary, eos_token_id=0, seed=0)
    exact: Any = DenseReferenceForCausalLM(model.config)
    exact.load_state_dict(model.state_dict())
    exact = exact.double().train()
    model.set_attn_implementation(attention)
    model = model.to(device).train()
    batch = make_batch(UniformInjection(ratio=0.1), rows=rows, length=length, vocabulary=vocabulary, policy="skip")
    inputs = batch.to_model_inputs(device=device)
    run = compile_model(model, device) if compiled else model
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = run(**inputs, use_cache=False).loss
    loss.backward()
    expected = exact(**batch.to_model_inputs(), use_cache=False).loss
    expected.backward()
    errors = {"loss": relative_error(loss.detach(), expected.detach())}
    gradients = dict(exact.named_parameters())
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.meta_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ):
        errors[f"gradient of {name}"] = relative_error(model.get_parameter(name).grad, gradients[name].grad)
    errors["logits with a cache"] = cached_error(model.eval(), exact.eval(), inputs["input_ids"], precision)
    wrong = {name: error for name, error in errors.items() if not error < ALLOWED[precision]}
    if wrong:
        raise AssertionError(f"beside float64, allowed {ALLOWED[precision]}: {wrong}")
    return {"relative_errors": errors, "allowed": ALLOWED[precision]}


@torch.no_grad()
def cached_error(model: Any, exact: Any, ids: Tensor, precision: str) -> float:
    """Read most of the rows at once and the rest token by token, and compare the logits of the last tokens."""
    num_single = 12
    found, cache = [], None
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        parts = [ids[:, :-num_single], *ids[:, -num_single:].split(1, dim=1)]
        for part in parts:
            output = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            found.append(output.logits)
    expected = exact(input_ids=ids.cpu(), use_cache=False).logits[:, -num_single:]
    return relative_error(torch.cat(found[1:], dim=1), expected)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found = found.double().cpu()
    return float((found - expected).norm() / expected.norm())


# how fast? ---------------------------------------------------------------------------------------------------


def measure_rates(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine's rates, in bfloat16 on a GPU, and the data sheet's."""
    turn, amounts = make_rates_turn(options.device, rates_precision(options))
    seconds = take_turns({"rates": turn}, rounds=options.rounds, warmup=1)["rates"]
    sheet = find_data_sheet(options)
    return {
        **{
            f"{name}, a second": spread(amounts[name] / one for one in values).median
            for name, values in seconds.items()
        },
        "data_sheet_bfloat16_operations_per_second": sheet,
    }


def rates_precision(options: argparse.Namespace) -> str:
    """Return the type in which the machine is at its best."""
    return "bfloat16" if options.device == "cuda" else "float32"


def find_data_sheet(options: argparse.Namespace) -> float | None:
    """Return the peak of the GPU by its name, such as NVIDIA H200 or NVIDIA A100-SXM4-80GB."""
    if options.gpu:
        return GPUS[options.gpu].bfloat16_flops
    if options.device == "cpu":
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    fits = [key for key in GPUS if all(word in name for word in key.split("-"))]
    return GPUS[fits[0]].bfloat16_flops if fits else None


def measure_presets(options: argparse.Namespace, length: int, attention: str, *, compiled: bool) -> dict[str, Any]:
    """Let the training steps of both presets take turns at a length."""
    overrides = ["--data.block_size", str(length), "--model.max_position_embeddings", str(length)]
    if options.tiny:
        overrides += [word for name, value in TINY_SHAPE.items() for word in (f"--model.{name}", str(value))]
    configs = {name: load_preset(name, overrides) for name in PRESETS}
    rows = {name: rows_that_fit(config, options) for name, config in configs.items()}
    steps = {
        name: training_step(config, options, rows=min(rows.values()), attention=attention, compiled=compiled)
        for name, config in configs.items()
    }
    rates_turn, amounts = make_rates_turn(options.device, rates_precision(options))
    turns = {name: lambda step=step: {"step": timed(step)} for name, step in steps.items()}
    rounds = take_turns({"rates": rates_turn, **turns}, rounds=options.rounds, warmup=options.warmup)
    matrix_rate = spread(amounts[MATRIX] / one for one in rounds["rates"][MATRIX]).median
    sheet = find_data_sheet(options)
    found: dict[str, Any] = {"rows": min(rows.values()), "matrix_operations_per_second": matrix_rate}
    for name, config in configs.items():
        seconds = spread(rounds[name]["step"])
        text = config.text_tokens_per_block
        flops = found["rows"] * training_flops(hf_config(config), num_positions=length, num_meta=length - text)
        found[name] = {
            "seconds_per_step": asdict(seconds),
            "positions_per_second": found["rows"] * length / seconds.median,
            "text_tokens_per_second": found["rows"] * text / seconds.median,
            "operations_per_second": flops / seconds.median,
            "share_of_the_measured_matrix_rate": flops / seconds.median / matrix_rate,
            "model_flops_utilisation": sheet and flops / seconds.median / sheet,
        }
    if options.device == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def training_step(
    config: PretrainConfig, options: argparse.Namespace, *, rows: int, attention: str, compiled: bool
) -> Callable[[], None]:
    """Return one optimizer step of a preset on a fixed batch, as the training loop does it."""
    model = build_model(config.model, text_vocab_size=TEXT_VOCABULARY, eos_token_id=TEXT_VOCABULARY - 1, seed=0)
    model.set_attn_implementation(attention)
    model.to(options.device)
    optimizer = build_optimizer(model, config.optimizer)
    step_model = compile_model(model, options.device) if compiled else model
    batch = make_batch(
        config.injection,
        rows=rows,
        length=config.data.block_size,
        vocabulary=TEXT_VOCABULARY,
        policy=config.model.loss_policy,
    )
    inputs = batch.to_model_inputs(device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            loss = step_model(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_batch(injection: Any, *, rows: int, length: int, vocabulary: int, policy: Any) -> Any:
    """Return a batch of random text with its meta-tokens."""
    positions = sample_meta_positions(injection, sample_ids=np.arange(rows), block_size=length, seed=0, epoch=0)
    text = np.random.default_rng(0).integers(vocabulary, size=(rows, length - positions.shape[1] + 1))
    return inject_meta_tokens(text, positions, meta_token_id=vocabulary, loss_policy=policy)


def hf_config(config: PretrainConfig) -> MetaTokenConfig:
    return MetaTokenConfig(**config.model.to_hf(TEXT_VOCABULARY, TEXT_VOCABULARY - 1))


def rows_that_fit(config: PretrainConfig, options: argparse.Namespace) -> int:
    """Return how many blocks a step may have."""
    if options.tiny:
        return 1
    length, model = config.data.block_size, hf_config(config)
    wanted = max(1, TOKENS // length)
    if options.device == "cpu":
        return wanted
    room = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory
    # both presets are there at once, eager attention aside
    room -= len(PRESETS) * BYTES_OF_STATE * count_parameters(model).total
    num_meta = length - config.text_tokens_per_block
    row = activation_bytes(model, num_positions=length, num_meta=num_meta, bfloat16=True)
    return max(1, min(wanted, int(room // row)))


def measure_overhead(options: argparse.Namespace, ratio: float, *, compiled: bool) -> Any:
    """Ask `metatokens bench training` at a ratio k."""
    shape: dict[str, Any] = {"num_hidden_layers": 12, "vocabulary": TEXT_VOCABULARY, "length": 1024, "rows": 16}
    if options.tiny:
        shape = TINY_SHAPE | {"vocabulary": 300, "length": 64}
    # to compile one takes half a minute
    contenders = ["plain", "meta_indices"] if compiled else ["plain", "plain_text", "meta", "meta_indices", "gpt2"]
    settings = TrainingBench(
        **shape,
        ratio=ratio,
        contenders=contenders,
        parts=("whole",) if compiled else ("decoder", "whole"),
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
        precision="bfloat16",
        compile=compiled,
    )
    return plain_tree(training.run(settings))


def measure_generation(options: argparse.Namespace, batch: int) -> Any:
    """Ask `metatokens bench generation`."""
    shape: dict[str, Any] = TINY_SHAPE | {"vocabulary": 300, "prompt": 32, "new": 9} if options.tiny else {"new": 128}
    settings = GenerationBench(
        **shape,
        batch=batch,
        # transformers compiles the steps with a static cache, which takes its time
        contenders=None if batch == 1 else ["plain_generate", "meta_generate", "gpt2_generate"],
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
        precision="bfloat16",
    )
    return plain_tree(generation.run(settings))


# -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a dry run: every kind of task at a tiny size")
    parser.add_argument("--minutes", type=float, default=8.5, help="no task begins after this time")
    parser.add_argument("--gpu", choices=GPUS, help="kind of GPU, if its name does not tell")
    parser.add_argument("--only", default="", help="only tasks whose name begins so, such as `check`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3, help="compilation falls into the first")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny runs every task without one")
    started = time.monotonic()
    report: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(options.device),
        "platform": platform.platform(),
        "tasks": {},
        "failed": {},
        "not_run": {},
    }
    for task in tasks(options):
        if not task.name.startswith(options.only):
            continue
        if time.monotonic() - started > 60 * options.minutes:
            report["not_run"][task.name] = f"{options.minutes} minutes were over"
            continue
        print(f"{time.monotonic() - started:6.0f} s  {task.name}", file=sys.stderr, flush=True)
        run_task(task, report)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("failed", "not_run")}, indent=1))
    return 1 if report["failed"] else 0


def run_task(task: Task, report: dict[str, Any]) -> None:
    """Keep what a task finds, or why it did not; and leave nothing of it in memory."""
    begun = time.monotonic()
    try:
        found = task.run()
        report["tasks"][task.name] = {"seconds": round(time.monotonic() - begun, 1), **found}
    except ImportError as error:  # flash attention is a package of its own
        report["not_run"][task.name] = " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001 the GPU is there for minutes: one task must not take the others with it
        report["failed"][task.name] = {"error": repr(error), "traceback": traceback.format_exc()}
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
