"""What do statistics of attention rows cost beside the forward pass that they look at?

In one process, in turns; `benchmarks/analysis.py` asks for the memory too, in processes of their own.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from metatokens.bench.analysis_contenders import ANALYSIS
from metatokens.bench.measuring import BenchResult, Contender, Pair, Work, measure, quiet, set_threads
from metatokens.bench.turns import timed
from metatokens.config.bench import AnalysisBench
from metatokens.config.schema import ModelConfig, UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.lens import Lens
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.accounting import forward_flops

REGISTRY = ANALYSIS
PAIRS = tuple(Pair(name, "forward") for name in ANALYSIS if name != "forward")
WEIGHTS_SCALE = 3.0  # makes rows of freshly drawn weights as sharp as a trained model's: a few nats


def run(settings: AnalysisBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = ANALYSIS.choose(settings.contenders)
    set_threads(settings)
    ids = make_ids(settings).to(settings.device)
    contenders = {}
    for name in names:
        say(f"building {name}")
        look = partial(make_look(settings, name), ids)
        contenders[name] = Contender(
            lambda look=look: {"look": timed(look)},  # type: ignore[misc]
            {"look": _work(settings, ids)},
            {"mean_entropy_nats": look()},
        )
    return measure("analysis", settings, ANALYSIS, contenders, pairs=PAIRS, not_run=not_run, say=say)


def make_look(settings: AnalysisBench, name: str) -> Callable[[Tensor], float | None]:
    """Return what looks at the rows of ids (1, T) as a contender does, on a model of its own."""
    lens = Lens(build(settings, name))
    return lambda ids: ANALYSIS[name](lens, ids, ids == settings.vocabulary)


def build(settings: AnalysisBench, name: str) -> MetaTokenForCausalLM:
    """Return a model with sharp rows; the one that stores weights computes them."""
    torch.manual_seed(0)
    model = MetaTokenForCausalLM(_config(settings)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(WEIGHTS_SCALE)
            block.self_attn.k_proj.weight.mul_(WEIGHTS_SCALE)
    model.set_attn_implementation("eager" if name == "stored" else "sdpa")
    moved: MetaTokenForCausalLM = model.to(settings.device)
    return moved


def make_ids(settings: AnalysisBench) -> Tensor:
    """Return (1, T) random ids with meta-tokens, whose id is above those of all text."""
    injection = UniformInjection(ratio=settings.ratio)
    num_text = settings.length - injection.num_meta(settings.length)
    text = torch.randint(settings.vocabulary, (1, num_text + 1), generator=torch.Generator().manual_seed(1))
    positions = sample_meta_positions(injection, sample_ids=np.arange(1), block_size=settings.length, seed=0, epoch=0)
    batch = inject_meta_tokens(text.numpy(), positions, meta_token_id=settings.vocabulary, loss_policy="skip")
    ids: Tensor = batch.to_model_inputs()["input_ids"]
    return ids


def _config(settings: AnalysisBench) -> MetaTokenConfig:
    shape = ModelConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=settings.length,
    )
    return MetaTokenConfig(**shape.to_hf(settings.vocabulary, eos_token_id=settings.vocabulary - 1))


def _work(settings: AnalysisBench, ids: Tensor) -> Work:
    num_meta = int((ids == settings.vocabulary).sum())
    operations = forward_flops(_config(settings), num_positions=settings.length, num_meta=num_meta, num_logits=0)
    return Work(settings.length - num_meta, settings.length, operations=operations)
