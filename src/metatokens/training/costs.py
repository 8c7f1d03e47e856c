"""What a pre-training run takes: memory per process, time, money and disk, computed from its config before it starts.

The next kind of GPU is one line in `GPUS`. Memory counts float32 weights, gradients and AdamW moments, what the
backward pass keeps of one micro-batch, and the buffers of the loss; it leaves out what the framework itself takes, so
`MEMORY_SHARE` of a GPU must hold it. Under FSDP2 each process keeps its share of the first three and makes whole one
block at a time. `benchmarks/plan.py` compares the sum with the peaks of real processes.
"""

import difflib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

from metatokens.baselines.building import build_config
from metatokens.config.attention import FullAttention
from metatokens.config.schema import NoInjection, PretrainConfig
from metatokens.errors import UsageError
from metatokens.model import MetaTokenConfig
from metatokens.model.accounting import ParameterCount, activation_bytes, count_parameters, training_flops
from metatokens.model.configuration import BIASES
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS
from metatokens.training.resuming import BYTES_PER_PARAMETER_OF_CHECKPOINT

FLOAT32_BYTES = 4
ADAMW_BYTES = 8  # two float32 moments
MEMORY_SHARE = 0.9  # of a GPU; the rest is left to the framework, the kernels' workspaces and fragmentation
UINT16_TOKENS = 2**16
SECONDS_PER_HOUR = 3600
UTILISATION = 0.4  # of the dense peak; an assumption, which `benchmarks/gpu.py` measures on a GPU
DOLLARS_PER_GPU_HOUR = 2.0  # an assumption: prices change by the week


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, with the figures of its maker's data sheet for dense products."""

    memory_bytes: float
    bfloat16_flops: float
    """Operations per second on tensor cores with float32 sums."""
    float32_flops: float
    """Operations per second in true float32, which is what torch uses unless told otherwise."""


GPUS: Mapping[str, Gpu] = {
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12),
    "h100": Gpu(80e9, 989e12, 67e12),
    "h200": Gpu(141e9, 989e12, 67e12),
    "b200": Gpu(180e9, 2250e12, 80e12),
    "l40s": Gpu(48e9, 362e12, 91.6e12),
    "rtx-4090": Gpu(24e9, 165e12, 82.6e12),
}

Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a training step, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """A chunk of logits, and the gradient of the output embedding, which is made with the loss."""
    gathered: int = 0
    """FSDP2: the blocks that are whole at the moment."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(astuple(self))


@dataclass(frozen=True)
class RunCost:
    """The cost of a run; seconds and money are those of `utilisation` and `dollars_per_gpu_hour`."""

    parameters: int
    steps: int
    text_tokens: int
    flops_per_text_token: float
    """Forward and backward pass."""
    plain_flops_per_text_token: float
    """The same of the model without meta-attention, on text alone."""
    memory_ddp: Memory
    memory_fsdp2: Memory
    gpu_memory_bytes: float
    largest_micro_batch: dict[Parallel, int]
    """Sequences that fit; 0 if none does."""
    utilisation: float
    step_seconds: float
    hours: float
    gpu_hours: float
    dollars_per_gpu_hour: float
    dollars: float
    shard_bytes: int
    """One pass over the text, tokenised."""
    checkpoint_bytes: int
    """All checkpoints that the run keeps, the one that is being written, and the final model."""


def plan_run(
    config: PretrainConfig,
    *,
    num_gpus: int,
    gpu: str,
    text_vocab_size: int,
    utilisation: float = UTILISATION,
    dollars_per_gpu_hour: float = DOLLARS_PER_GPU_HOUR,
) -> RunCost:
    """Compute the cost of a run on `num_gpus` GPUs.

    Raises:
        UsageError: for a batch that the GPUs cannot share equally, or an attention whose memory is not counted.
    """
    if not isinstance(config.model.attention, FullAttention) or config.model.position_encoding in BIASES:
        raise UsageError(
            "metatokens plan",
            expected="full attention without a bias of positions",
            found=f"attention {config.model.attention.kind}, positions {config.model.position_encoding}",
            remedy="the masks of the others are not counted; `metatokens info` counts their operations",
        )
    training, block_size, num_text = config.training, config.data.block_size, config.text_tokens_per_block
    rows = min(training.micro_batch_blocks, training.batch_blocks // num_gpus or 1)
    if training.batch_blocks % (num_gpus * rows):
        raise UsageError(
            "training.batch_blocks",
            expected=f"a multiple of {num_gpus} GPUs x training.micro_batch_blocks {rows}",
            found=str(training.batch_blocks),
            remedy="change either setting or --gpus",
        )
    model = build_config(config.model, text_vocab_size=text_vocab_size, eos_token_id=text_vocab_size - 1)
    device = find_gpu(gpu)
    flops = training_flops(model, num_positions=block_size, num_meta=block_size - num_text)
    work = flops * (4 / 3 if training.gradient_checkpointing else 1)  # the forward pass once more
    peak = device.bfloat16_flops if training.precision == "bfloat16" else device.float32_flops
    step_seconds = work * training.batch_blocks / (num_gpus * peak * utilisation)
    hours = step_seconds * config.total_steps / SECONDS_PER_HOUR
    text_tokens = config.total_steps * training.batch_blocks * num_text
    parameters = count_parameters(model).total
    copies = config.checkpoint.keep + 1
    return RunCost(
        parameters=parameters,
        steps=config.total_steps,
        text_tokens=text_tokens,
        flops_per_text_token=flops / num_text,
        plain_flops_per_text_token=_plain_flops(config, text_vocab_size) / num_text,
        memory_ddp=count_memory(config, model, parallel="ddp", num_gpus=num_gpus, rows=rows),
        memory_fsdp2=count_memory(config, model, parallel="fsdp2", num_gpus=num_gpus, rows=rows),
        gpu_memory_bytes=device.memory_bytes,
        largest_micro_batch={
            "ddp": _largest_micro_batch(config, model, "ddp", num_gpus, device),
            "fsdp2": _largest_micro_batch(config, model, "fsdp2", num_gpus, device),
        },
        utilisation=utilisation,
        step_seconds=step_seconds,
        hours=hours,
        gpu_hours=hours * num_gpus,
        dollars_per_gpu_hour=dollars_per_gpu_hour,
        dollars=hours * num_gpus * dollars_per_gpu_hour,
        shard_bytes=text_tokens * (2 if text_vocab_size <= UINT16_TOKENS else 4),
        checkpoint_bytes=parameters * (copies * BYTES_PER_PARAMETER_OF_CHECKPOINT + FLOAT32_BYTES),
    )


def find_gpu(name: str) -> Gpu:
    """Return the kind of GPU of this name.

    Raises:
        UsageError: it is not known; the message has the nearest name.
    """
    if name not in GPUS:
        close = difflib.get_close_matches(name.lower(), GPUS, n=1)
        raise UsageError(
            "--gpu",
            expected=f"one of {', '.join(GPUS)}",
            found=name,
            remedy=f"did you mean {close[0]!r}?" if close else "choose the one that is most alike",
        )
    return GPUS[name]


def _plain_flops(config: PretrainConfig, text_vocab_size: int) -> int:
    """Count the operations of a block's text in the model without meta-attention."""
    shape = config.model.model_copy(update={"meta_attention_layers": "none", "meta_attention_over": "meta"})
    plain = config.model_copy(update={"model": shape, "injection": NoInjection()})
    model = build_config(plain.model, text_vocab_size=text_vocab_size, eos_token_id=text_vocab_size - 1)
    return training_flops(model, num_positions=config.text_tokens_per_block)


def count_memory(
    config: PretrainConfig, model: MetaTokenConfig, *, parallel: Parallel, num_gpus: int, rows: int
) -> Memory:
    """Count the bytes of one process at the peak of a training step.

    Args:
        config: the run.
        model: its model's config.
        parallel: ddp keeps everything in each process; fsdp2 keeps a share.
        num_gpus: processes.
        rows: sequences of a micro-batch.
    """
    training, count = config.training, count_parameters(model)
    bfloat16 = training.precision == "bfloat16"
    narrow = 2 if bfloat16 else FLOAT32_BYTES
    block_size = config.data.block_size
    num_meta = block_size - config.text_tokens_per_block
    head = model.vocab_size * model.hidden_size
    activations = rows * activation_bytes(
        model,
        num_positions=block_size,
        num_meta=num_meta,
        bfloat16=bfloat16,
        checkpointed=training.gradient_checkpointing,
    )
    num_targets = rows * config.text_tokens_per_block
    # log-probabilities in float32, and under autocast the logits and the narrow gradient beside them
    chunk = min(LOGITS_CHUNK_ELEMENTS, num_targets * model.vocab_size) * (8 if bfloat16 else 2 * FLOAT32_BYTES)
    states = 2 * num_targets * model.hidden_size * narrow + head * (FLOAT32_BYTES + (narrow if bfloat16 else 0))
    shares = num_gpus if parallel == "fsdp2" else 1
    parameters = -(-count.total // shares)
    # DDP's buckets are there from the start; FSDP2 shares out each block's gradients behind its backward pass
    accumulates = (num_gpus > 1 and parallel == "ddp") or training.batch_blocks > num_gpus * rows
    gradients = parameters * FLOAT32_BYTES
    if not accumulates:
        # gradients come as activations go
        gradients = max(0, gradients - activations - chunk - states)
    casts = (count.total - count.embedding - count.positions) * narrow if bfloat16 and parallel == "ddp" else 0
    return Memory(
        weights=parameters * FLOAT32_BYTES,
        gradients=gradients,
        optimizer=parameters * ADAMW_BYTES,
        activations=activations + casts,
        loss=chunk + states,
        gathered=_gathered_bytes(model, count, narrow) if parallel == "fsdp2" else 0,
    )


def _gathered_bytes(model: MetaTokenConfig, count: ParameterCount, narrow: int) -> int:
    """Count what FSDP2 holds whole: two blocks and the embeddings, and the float32 gradients of one of each."""
    block = -(-(count.blocks + count.meta_attention) // model.num_hidden_layers)
    root = count.embedding + count.positions
    return (2 * block + root) * narrow + (block + root) * FLOAT32_BYTES


def _largest_micro_batch(
    config: PretrainConfig, model: MetaTokenConfig, parallel: Parallel, num_gpus: int, gpu: Gpu
) -> int:
    """Return the largest divisor of a process's sequences that fits as a micro-batch; 0 if none does."""
    share = config.training.batch_blocks // num_gpus
    fitting = (
        rows
        for rows in range(share, 0, -1)
        if share % rows == 0
        and count_memory(config, model, parallel=parallel, num_gpus=num_gpus, rows=rows).total
        <= MEMORY_SHARE * gpu.memory_bytes
    )
    return next(fitting, 0)
