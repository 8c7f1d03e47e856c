"""The cost of a model, counted from its config; `metatokens.bench` times it."""

from dataclasses import asdict
from typing import Any

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.generation.decoding import sequence_limit
from metatokens.graft import costs
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.model import MetaTokenConfig
from metatokens.model.accounting import cache_bytes, count_parameters, training_flops

FLOAT32_BYTES = 4
CACHE_POSITIONS = (1_024, 8_192, 65_536)


def describe_model(
    config: MetaTokenConfig, *, block_size: int | None = None, num_meta: int | None = None
) -> dict[str, Any]:
    """Return parameters, operations and memory of the model of `config`.

    Args:
        config: the model.
        block_size: T of a training sequence; by default the model's whole window.
        num_meta: M of a training sequence; by default none.
    """
    block_size, num_meta = block_size or config.max_position_embeddings, num_meta or 0
    count = count_parameters(config)
    padding = 0 if config.meta_token_id is None else (config.vocab_size - config.meta_token_id) * config.hidden_size
    per_block = training_flops(config, num_positions=block_size, num_meta=num_meta)
    per_key = 2 * config.num_hidden_layers * config.hidden_size * FLOAT32_BYTES
    return {
        "parameters": count.total,
        "parameters_at_text_vocabulary": count.total - padding,
        "parameters_of_embedding": count.embedding,
        "parameters_of_positions": count.positions,
        "parameters_of_blocks": count.blocks,
        "parameters_of_meta_attention": count.meta_attention,
        "block_positions": block_size,
        "block_meta_tokens": num_meta,
        "training_flops_per_text_token": per_block / (block_size - num_meta),
        "weights_bytes": count.total * FLOAT32_BYTES,
        "training_state_bytes": 4 * count.total * FLOAT32_BYTES,
        "cache_bytes_per_token": per_key,
        "cache_bytes_per_meta_token_more": per_key
        * sum(config.has_meta_attention(i) for i in range(config.num_hidden_layers))
        // config.num_hidden_layers,
        **_describe_memory(config, num_meta / block_size),
    }


def _describe_memory(config: MetaTokenConfig, meta_ratio: float) -> dict[str, int]:
    """Return the bytes of the cache of memory mode or with a state at some lengths; nothing for other models."""
    if config.memory_policy is None and config.count_extra_cache() == 0:
        return {}
    rows: dict[str, int] = {}
    for positions in CACHE_POSITIONS:
        kept = cache_bytes(config, num_positions=positions, num_meta=round(meta_ratio * positions))
        rows |= {f"cache_of_{positions}_positions_{part}_bytes": size for part, size in asdict(kept).items()}
    return rows


def describe_pretrained(model: PretrainedCausalLM) -> dict[str, Any]:
    """Return parameters, operations and memory of a model of another package, as far as `describe_model` can."""
    parameters, block_size = model.num_parameters(), sequence_limit(model) or 1
    return {
        "parameters": parameters,
        "block_positions": block_size,
        "training_flops_per_text_token": model.training_flops(num_positions=block_size) / block_size,
        "weights_bytes": parameters * FLOAT32_BYTES,
        "training_state_bytes": 4 * parameters * FLOAT32_BYTES,
        **_describe_graft(model.wrapped),
    }


def _describe_graft(model: Any) -> dict[str, int]:
    """Return the new parameters of a graft, and the bytes of its cache at some lengths of text; nothing for others."""
    added = getattr(model, GRAFT, None)
    if added is None:
        return {}
    rows = {
        "parameters_of_graft": sum(parameter.numel() for parameter in added.parameters()),
        "parameters_of_meta_attention": sum(parameter.numel() for parameter in added.meta_attn.parameters()),
    }
    for num_text in CACHE_POSITIONS:
        kept = costs.cache_bytes(model, num_text=num_text)
        rows |= {f"cache_of_{num_text}_positions_{part}_bytes": size for part, size in asdict(kept).items()}
    return rows
