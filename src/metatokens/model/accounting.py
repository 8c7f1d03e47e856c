"""Parameters, floating-point operations and memory of a model, counted from its config alone.

A multiply and an add count as two operations. Attention counts only the pairs of query and key that causality and
its pattern allow, so a utilisation computed from these figures does not count wasted work.
"""

from dataclasses import dataclass

from .configuration import ADAPTIVE, MetaTokenConfig
from .memory import count_columns
from .position_bias import NUM_BUCKETS


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters by purpose; the tied output head counts once, as embedding."""

    embedding: int
    positions: int
    blocks: int
    """Self-attention, MLP and norms."""
    meta_attention: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.positions + self.blocks + self.meta_attention


def count_parameters(config: MetaTokenConfig) -> ParameterCount:
    """Count the parameters of the model that `config` describes."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    norm = 2 * width
    heads, encoding = config.num_attention_heads, config.position_encoding
    positions = {"learned": config.num_positions * width, "t5": NUM_BUCKETS * heads}
    positions |= dict.fromkeys(("kerple", "dape_kerple"), 2 * heads)
    if encoding == "transformer_xl":
        attention += width * width + 2 * width
    elif encoding in ADAPTIVE:
        attention += (2 * heads + 1) * heads + (heads + 1) * heads
    return ParameterCount(
        embedding=config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
        + (0 if config.thought_length is None else 2 * width),
        positions=positions.get(encoding, 0),
        blocks=layers * (attention + mlp + 2 * norm) + norm + config.count_extra_parameters(),
        meta_attention=_num_meta_layers(config) * attention,
    )


def forward_flops(
    config: MetaTokenConfig, *, num_positions: int, num_meta: int = 0, num_logits: int | None = None
) -> int:
    """Count the operations of one forward pass over one sequence.

    Args:
        config: the model; meta-attention and self-attention are counted as it configures them.
        num_positions: T, text and meta-tokens.
        num_meta: M, meta-tokens among them.
        num_logits: positions whose logits are made; by default those of the text tokens.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    projections = 2 * num_positions * (4 * width * width + 2 * width * config.intermediate_size)
    pairs = sum(config.count_attention_pairs(i, num_positions, num_meta) for i in range(layers))
    head = 2 * (num_positions - num_meta if num_logits is None else num_logits) * width * config.vocab_size
    members = config.count_meta_attention_members(num_positions, num_meta)
    pairs_of_members = config.count_meta_attention_pairs(num_positions, num_meta)
    meta = 2 * members * 4 * width * width + _attention_flops(width, pairs_of_members)
    meta += _position_flops(config, members, pairs_of_members)
    text = (
        layers * projections + _attention_flops(width, pairs) + _position_flops(config, layers * num_positions, pairs)
    )
    return text + head + _num_meta_layers(config) * meta + config.count_extra_flops(num_positions)


def training_flops(
    config: MetaTokenConfig, *, num_positions: int, num_meta: int = 0, num_logits: int | None = None
) -> int:
    """Count the operations of forward and backward pass over one sequence; the backward pass does twice the work."""
    return 3 * forward_flops(config, num_positions=num_positions, num_meta=num_meta, num_logits=num_logits)


@dataclass(frozen=True)
class CacheBytes:
    """What a sequence takes in the cache, in bytes."""

    text: int
    """Keys and values of self-attention: all tokens, or in memory mode the sinks and the window; and a state."""
    anchors: int
    """Those that memory mode keeps beyond these."""
    meta_attention: int
    """The second cache, of meta-attention."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.text + self.anchors + self.meta_attention


def cache_bytes(
    config: MetaTokenConfig, *, num_positions: int, num_meta: int = 0, bytes_per_number: int = 4
) -> CacheBytes:
    """Count the bytes of the cache of one sequence after a step; rows of a batch take as much as the largest each.

    Args:
        config: the model.
        num_positions: T tokens read, text and meta-tokens, without padding.
        num_meta: M, meta-tokens among them.
        bytes_per_number: 4 for float32, 2 for half precision.
    """
    assert config.head_dim is not None
    wide = config.hidden_size if config.position_encoding == "transformer_xl" else 0
    per_column = (2 * config.head_dim + wide) * config.num_attention_heads * bytes_per_number
    policy = config.memory_policy
    columns, anchors = 0, 0
    for layer_index in range(config.num_hidden_layers):
        if policy is None or not policy.applies_to(layer_index):
            columns += num_positions
            continue
        of_text, of_anchors = count_columns(policy, num_positions, num_meta)
        columns, anchors = columns + of_text, anchors + of_anchors
    members = config.count_meta_attention_members(num_positions, num_meta)
    if policy is not None and policy.memory_limit is not None:
        members = min(members, policy.memory_limit)
    text = per_column * columns + config.count_extra_cache() * bytes_per_number
    return CacheBytes(text, per_column * anchors, per_column * members * _num_meta_layers(config))


def activation_bytes(
    config: MetaTokenConfig,
    *,
    num_positions: int,
    num_meta: int = 0,
    bfloat16: bool = False,
    checkpointed: bool = False,
) -> int:
    """Count the bytes of the activations that the backward pass of one sequence needs, without the loss and its logits.

    For eager training with fused attention kernels and no dropout. The residual stream and the norms stay float32
    under autocast to bfloat16; what enters a product or an activation function is kept in the narrow type, once per
    product.

    Args:
        config: the model. The explicit masks of biases, cross-attention, Landmark and sparse attention are not counted.
        num_positions: T, text and meta-tokens.
        num_meta: M, meta-tokens among them.
        bfloat16: train under autocast to bfloat16, otherwise in float32.
        checkpointed: keep the input of each block alone (`gradient_checkpointing`), and make one block's at a time.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    wide, narrow = 4, 2 if bfloat16 else 4
    # q, k and v each keep the cast of their common input; in float32 it is one tensor
    inputs_of_projections = 3 * narrow if bfloat16 else wide
    attention = inputs_of_projections + 4 * narrow  # q, k, v and the output, which enters the last product
    statistics = 2 * wide  # mean and inverse deviation of a norm
    # the stream before each norm, and under autocast the norm's float32 output is only passed on
    block = num_positions * (
        (2 * wide + attention + narrow) * width
        + 2 * narrow * inner
        + 2 * statistics
        + wide * config.num_attention_heads  # log-sum-exp of each row
    )
    members = config.count_meta_attention_members(num_positions, num_meta)
    # the gathered rows and their float32 norm, which has no weights and keeps its output
    meta = members * ((2 * wide + attention) * width + statistics + wide * config.num_attention_heads)
    ends = num_positions * (2 * wide * width + statistics)  # the embeddings, and the stream before the last norm
    blocks = layers * block + _num_meta_layers(config) * meta
    if checkpointed:
        blocks = layers * num_positions * wide * width + block + min(1, _num_meta_layers(config)) * meta
    return blocks + ends


def _attention_flops(width: int, num_pairs: int) -> int:
    """Scores and weighted sum over pairs of a query and a key."""
    return 2 * 2 * width * num_pairs


def _position_flops(config: MetaTokenConfig, num_tokens: int, num_pairs: int) -> int:
    """What a position encoding with weights of its own in each attention adds; that of the others is not counted."""
    heads, width = config.num_attention_heads, config.hidden_size
    if config.position_encoding == "transformer_xl":
        return 2 * num_tokens * width * width + 2 * num_pairs * heads * width
    return 2 * num_pairs * 3 * heads * heads if config.position_encoding in ADAPTIVE else 0


def _num_meta_layers(config: MetaTokenConfig) -> int:
    return sum(config.has_meta_attention(i) for i in range(config.num_hidden_layers))
