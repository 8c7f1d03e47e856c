"""`MetaTokenConfig`: the shape of a meta-token language model, under transformers' field names.

A plain GPT-2 is the same class with `meta_attention_layers="none"`; a pause-token model is that plus injection.
"""

import math
import os
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .export import AUTO_MAP, copy_code
from .memory import MemoryPolicy, count_pairs
from .memory_cache import MEMORY_LAYER

LOSS_POLICIES = ("skip", "retarget")
CROSS = ("cross", "gather")
META_ATTENTION_MEMBERS = ("meta", "all", "random", *CROSS)
ENDLESS = 2**31 - 1  # positions of a text that may be of any length
ROTATIONS = ("rope", "xpos", "fourier")
ADAPTIVE = ("dape_alibi", "dape_kerple")
BIASES = ("alibi", "t5", "kerple", *ADAPTIVE)
POSITION_ENCODINGS = (*ROTATIONS, *BIASES, "transformer_xl", "learned", "none")


@strict
class MetaTokenConfig(PreTrainedConfig):
    """Configuration of `MetaTokenModel`; the defaults are the paper's RoPE model (section 4.1).

    Args:
        vocab_size: V, rows of the embedding: text tokens, meta-token and padding, rounded up as one likes.
        hidden_size: C, width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: H, heads of both attentions.
        head_dim: D, width of a head; None means hidden_size / num_attention_heads.
        hidden_act: Activation of the MLP, by its name in transformers.
        max_position_embeddings: The longest sequence, meta-tokens included.
        initializer_range: Standard deviation of the initial weights.
        layer_norm_eps: Added to the variance in every LayerNorm.
        attention_dropout: Dropout on attention weights, in training alone.
        hidden_dropout: Dropout on the embedding and on the output of each sub-layer, in training alone.
        use_cache: Whether a forward pass returns its cache.
        tie_word_embeddings: Whether the output head has the weights of the embedding.
        position_encoding: How positions enter both attentions: "rope", "xpos" (RoPE with scores that decay with the
            distance), "fourier" (mixed frequencies), "learned", "alibi", "t5" (a learned bias by distance), "kerple"
            (minus a logarithm of the distance), "dape_alibi" and "dape_kerple" (a map of the scores and that bias),
            "transformer_xl" (relative keys, and embeddings scaled by the root of the width) or "none".
        position_layers: Which blocks have positions: "all", "even" (every second one, the first included) or a list of
            indices; only where queries and keys are rotated. Both attentions of the others are without.
        position_range: N: randomised positions, in training drawn out of N for each row, and otherwise evenly spread
            over them; None means that positions count the tokens.
        rope_parameters: Base and scaling of RoPE, as transformers writes them; None means theta 10,000 unscaled.
        meta_attention_layers: Which blocks have meta-attention: "all", "none" or a list of indices.
        meta_attention_over: The members of meta-attention: "meta", the meta-tokens; "all", every token, at full cost;
            "random", pseudo-random text tokens in place of the meta-tokens. Or who reads whom: "cross", meta-tokens the
            text before them and text the meta-tokens before it; "gather", the first of these alone.
        random_ratio: Share of the text tokens that are members if meta_attention_over is "random".
        thought_length: Length n of a thought: of every n + 2 meta-tokens of a row, the first and the last, its start
            and its end, have vectors of their own added to the embedding. The cache of meta-attention counts them.
            None means that all meta-tokens are alike.
        meta_token_id: The id of the meta-token, the first behind the text vocabulary; None means a model without one.
        memory: The fields of `MemoryPolicy`: self-attention sees a window, the first tokens and kept anchors, and the
            cache drops the rest; None means that it sees everything.
        loss_policy: "skip" drops the loss term whose target is a meta-token (paper); "retarget" predicts the next
            text token from the last text token and uses no output at a meta-token.
        pad_token_id: The id of padding, which is not the meta-token.
        bos_token_id: The id that begins a text.
        eos_token_id: The id, or the ids, that end a text.
    """

    model_type = "metatokens"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        f"layers.*.{module}": plan
        for attention in ("self_attn", "meta_attn")
        for module, plan in (
            (f"{attention}.q_proj", "colwise"),
            (f"{attention}.k_proj", "colwise"),
            (f"{attention}.v_proj", "colwise"),
            (f"{attention}.o_proj", "rowwise"),
            ("mlp.up_proj", "colwise"),
            ("mlp.down_proj", "rowwise"),
        )
    }

    vocab_size: int = 50_304
    hidden_size: int = 768
    intermediate_size: int = 3_072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1_024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    position_encoding: str = "rope"
    position_layers: str | list[int] = "all"
    position_range: int | None = None
    rope_parameters: dict[str, Any] | None = None
    meta_attention_layers: str | list[int] = "all"
    meta_attention_over: str = "meta"
    random_ratio: float | int = 0.1
    thought_length: int | None = None
    meta_token_id: int | None = None
    memory: dict[str, Any] | None = None
    loss_policy: str = "skip"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the fields that follow from others."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.has_rotation and not self.rope_parameters:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        if "attention_pattern" in kwargs:
            # transformers would keep the unknown field and build full attention in its place
            raise ValueError(
                "MetaTokenConfig has no attention_pattern: use SparseAttentionConfig of metatokens.baselines"
            )
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Standardize RoPE parameters where there are any; other position encodings have none."""
        if not self.has_rotation:
            # kept so that `validate_choices` refuses it
            self.rope_parameters = self.rope_parameters or kwargs.pop("rope_scaling", None)
            return kwargs
        converted: dict[str, Any] = super().convert_rope_params_to_dict(**kwargs)
        return converted

    # a property and not a field: a serialised `layer_types` with a name unknown to transformers breaks whatever loads
    # the config through the base class, such as Trainer's resume
    @property
    def layer_types(self) -> list[str]:
        """Return the cache layer type of each block; transformers builds its caches from these."""
        policy = self.memory_policy
        return [
            MEMORY_LAYER
            if policy is not None and policy.applies_to(i)
            else "meta_attention"
            if self.has_meta_attention(i)
            else "full_attention"
            for i in range(self.num_layers)
        ]

    @property
    def memory_policy(self) -> MemoryPolicy | None:
        """What memory mode keeps; None without memory mode.

        Raises:
            ValueError: for an unknown, missing or wrong field of `memory`.
        """
        return None if self.memory is None else MemoryPolicy.read(self.memory)

    @property
    def has_rotation(self) -> bool:
        """Tell whether queries and keys are rotated by their positions."""
        return self.position_encoding in ROTATIONS

    @property
    def residual_std(self) -> float:
        """Standard deviation of the initial weights of what adds to the residual stream; GPT-2, section 2.3."""
        # smaller by the root of the number of additions
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def num_key_value_heads(self) -> int:
        """Both attentions are multi-head: as many key heads as query heads."""
        return self.num_attention_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        if value != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads must equal num_attention_heads {self.num_attention_heads}, not {value}: "
                "grouped-query attention is not supported"
            )

    @property
    def max_sequence_length(self) -> int:
        """The longest input, in positions; dynamic RoPE scaling stretches it, and compact positions have no end."""
        rope = self.rope_parameters or {}
        factor = rope["factor"] if rope.get("rope_type") == "dynamic" else 1
        if self.memory is not None and self.memory.get("positions") == "compact":
            return ENDLESS
        return int(self.max_position_embeddings * factor)

    @property
    def num_positions(self) -> int:
        """Positions at which tokens can stand: those of the longest text, or N where they are randomised."""
        return self.position_range or self.max_position_embeddings

    @property
    def trained_window(self) -> int:
        """The window where nobody names one: the longest input, or max_position_embeddings if that has no end."""
        longest = self.max_sequence_length
        return self.max_position_embeddings if longest == ENDLESS else longest

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config.json and the code that its `auto_map` names; a subclass names none and saves none."""
        if type(self) is MetaTokenConfig:
            # by hand: transformers' own helper would leave out all Auto classes but that of the model being saved
            self.auto_map = (getattr(self, "auto_map", None) or {}) | AUTO_MAP
            copy_code(Path(save_directory))
        elif getattr(self, "auto_map", None) == AUTO_MAP:
            del self.auto_map  # made from the fields of a loaded MetaTokenConfig
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_length(self, num_positions: int) -> None:
        """Raise ValueError for a sequence longer than the model."""
        if num_positions > self.max_sequence_length:
            raise ValueError(
                f"sequence of {num_positions} positions is longer than the model's {self.max_sequence_length} "
                "(max_position_embeddings); shorten it or extend the model with an explicit RoPE scaling"
            )

    def has_meta_attention(self, layer_index: int) -> bool:
        """Tell whether block `layer_index` has a meta-attention."""
        if isinstance(self.meta_attention_layers, str):
            return self.meta_attention_layers == "all"
        return layer_index in self.meta_attention_layers

    def has_positions(self, layer_index: int) -> bool:
        """Tell whether positions enter the attentions of block `layer_index`."""
        if isinstance(self.position_layers, str):
            return self.position_layers == "all" or layer_index % 2 == 0
        return layer_index in self.position_layers

    @property
    def takes_meta_tokens(self) -> bool:
        """Tell whether meta-attention depends on which tokens are meta-tokens, and on nothing else."""
        return self.meta_attention_over in ("meta", *CROSS)

    def count_attention_pairs(self, layer_index: int, num_positions: int, num_meta: int) -> int:
        """Count the (query, key) pairs of the self-attention of a block over T positions, M of them meta-tokens."""
        policy = self.memory_policy
        if policy is not None and policy.applies_to(layer_index):
            return count_pairs(policy, num_positions, num_meta)
        return num_positions * (num_positions + 1) // 2

    def count_meta_attention_members(self, num_positions: int, num_meta: int) -> int:
        """Count the tokens in meta-attention over T positions, M of them meta-tokens; "random" gives its mean."""
        if self.meta_attention_over == "random":
            return round(self.random_ratio * (num_positions - num_meta))
        return num_meta if self.meta_attention_over == "meta" else num_positions

    def count_meta_attention_pairs(self, num_positions: int, num_meta: int) -> int:
        """Count its (query, key) pairs likewise; "gather" gives the mean over all places of the meta-tokens."""
        if self.meta_attention_over in CROSS:
            # of a meta-token and a text token, the later one reads the other
            pairs = num_meta * (num_positions - num_meta)
            return pairs if self.meta_attention_over == "cross" else pairs // 2
        members = self.count_meta_attention_members(num_positions, num_meta)
        return members * (members + 1) // 2

    def count_extra_parameters(self) -> int:
        """Count the parameters that a subclass adds to the blocks."""
        return 0

    def count_extra_flops(self, num_positions: int) -> int:
        """Count the operations that a subclass adds to a forward pass over T positions."""
        del num_positions
        return 0

    def count_extra_cache(self) -> int:
        """Count the numbers that a subclass adds to the cache of a sequence."""
        return 0

    def validate_layer_type(self) -> None:
        """Check `meta_attention_layers`; the base class would check `layer_types` against its own names."""
        layers = self.meta_attention_layers
        if isinstance(layers, str):
            if layers not in ("all", "none"):
                raise ValueError(f'meta_attention_layers must be "all", "none" or a list of indices, not {layers!r}')
            return
        outside = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(f"meta_attention_layers {outside} are outside 0..{self.num_hidden_layers - 1}")

    def validate_position_layers(self) -> None:
        """Check `position_layers`, and that the rest of the config can do with it."""
        layers = self.position_layers
        if layers == "all":
            return
        if isinstance(layers, str) and layers != "even":
            raise ValueError(f'position_layers must be "all", "even" or a list of indices, not {layers!r}')
        outside = [i for i in layers if isinstance(i, int) and not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(f"position_layers {outside} are outside 0..{self.num_hidden_layers - 1}")
        if not self.has_rotation:
            raise ValueError(f"position_layers needs position_encoding in {ROTATIONS}, not {self.position_encoding!r}")
        if (self.memory or {}).get("positions") == "compact":
            raise ValueError('memory.positions "compact" needs position_layers "all"')

    def validate_position_range(self) -> None:
        """Check `position_range`, and that the rest of the config can do with it."""
        if self.position_range is None:
            return
        if self.position_range <= self.max_position_embeddings:
            raise ValueError(
                f"position_range {self.position_range} must exceed max_position_embeddings "
                f"{self.max_position_embeddings}, the longest text"
            )
        if self.position_encoding == "none" or (self.rope_parameters or {}).get("rope_type", "default") != "default":
            raise ValueError("position_range needs a position_encoding other than none, without RoPE scaling")
        if self.memory is not None:
            raise ValueError("memory does not take position_range: its tokens count positions themselves")

    def validate_memory(self) -> None:
        """Check the memory's fields, and that the rest of the config can do with it."""
        policy = self.memory_policy
        if policy is None:
            return
        if self.model_type != MetaTokenConfig.model_type:
            raise ValueError(f"memory is a mode of {MetaTokenConfig.model_type}, not of {self.model_type}")
        if policy.anchors != "every" and self.meta_token_id is None:
            raise ValueError(
                f'memory.anchors "{policy.anchors}" needs a meta_token_id; "every" keeps every n-th token of text'
            )
        if self.meta_attention_over != "meta" and self.meta_attention_layers != "none":
            raise ValueError(
                f'memory needs meta_attention_over "meta", not {self.meta_attention_over!r}, whose members are evicted'
            )
        if policy.positions == "compact" and (self.position_encoding != "rope" or policy.layers != "all"):
            raise ValueError('memory.positions "compact" needs position_encoding "rope" and memory.layers "all"')
        if policy.memory_limit is not None and policy.layers != "all" and self.meta_attention_layers != "none":
            raise ValueError(
                'memory.memory_limit with meta-attention needs memory.layers "all": one limit for all blocks'
            )
        if self.position_encoding in ADAPTIVE:
            raise ValueError(f"memory does not take position_encoding {self.position_encoding!r}")
        if policy.positions == "text" and policy.layers != "all" and self.position_encoding in BIASES:
            raise ValueError(
                f'memory.positions "text" under position_encoding {self.position_encoding!r} needs memory.layers "all"'
            )
        outside = [] if isinstance(policy.layers, str) else [i for i in policy.layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(f"memory.layers {outside} are outside 0..{self.num_layers - 1}")

    def validate_thoughts(self) -> None:
        """Check that a cache counts the meta-tokens of thoughts."""
        if self.thought_length is None:
            return
        if self.thought_length < 1:
            raise ValueError(f"thought_length must be at least 1 or None, not {self.thought_length}")
        if not (self.takes_meta_tokens and any(map(self.has_meta_attention, range(self.num_layers)))):
            raise ValueError("thought_length needs meta-attention over meta-tokens, whose cache counts them")
        if self.memory is not None:
            raise ValueError("thought_length does not go with memory, which counts the meta-tokens that it keeps")

    def validate_choices(self) -> None:
        """Check the fields whose values come from a fixed list, and that padding is not a meta-token."""
        if self.position_encoding not in POSITION_ENCODINGS:
            raise ValueError(f"position_encoding must be one of {POSITION_ENCODINGS}, not {self.position_encoding!r}")
        if self.meta_attention_over not in META_ATTENTION_MEMBERS:
            raise ValueError(
                f"meta_attention_over must be one of {META_ATTENTION_MEMBERS}, not {self.meta_attention_over!r}"
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default" and self.position_encoding != "rope":
            raise ValueError(
                f'RoPE scaling {rope_type!r} needs position_encoding "rope", not {self.position_encoding!r}'
            )
        if not 0 <= self.random_ratio <= 1:
            raise ValueError(f"random_ratio must lie in 0..1, not {self.random_ratio}")
        if self.loss_policy not in LOSS_POLICIES:
            raise ValueError(f"loss_policy must be one of {LOSS_POLICIES}, not {self.loss_policy!r}")
        if self.meta_token_id is not None and self.meta_token_id == self.pad_token_id:
            raise ValueError(f"pad_token_id must differ from meta_token_id {self.meta_token_id}")
