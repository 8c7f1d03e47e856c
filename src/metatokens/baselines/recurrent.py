"""The Block-Recurrent Transformer (Hutchins et al. 2022): one block of the decoder carries a state along the text.

The text is cut into windows of W tokens. In every block a token sees the last W keys, itself included. In the recurrent
one it also reads S state vectors, which know all windows before its own: by a second query and softmax, whose output is
projected and added to that of self-attention. At the end of a window the state attends to itself and to the tokens of
the window, and a gate g = sigmoid(b) with a learned b mixes old and new, g state + (1 - g) new. Tokens show the state
the keys and values of their self-attention, without positions; the state has one set of keys and values for both. State
vectors have learned initial values and ids, which are added after their norm. `recurrent_reference.py` is the slow and
obvious form. Meta-tokens are tokens like any other.

A state is read by the next window alone, so nothing leaks; gradients flow through all windows of a sequence. A cache
keeps all keys, as under the other patterns, and beside them the state and the tokens of the last window.
Deviation: the sub-layers of the Block-Recurrent Transformer are this package's, with biases, without normalised keys,
and with the position encoding of the model. The authors' code shows the state the window before as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from metatokens.baselines.cache import RECURRENT_LAYER, RecurrentDynamicLayer
from metatokens.baselines.masks import (
    Pattern,
    SlidingWindow,
    SparseAttentionConfig,
    SparseAttentionForCausalLM,
    SparseAttentionModel,
    SparseBlock,
    SparseSelfAttention,
)
from metatokens.model.attention import SelfAttention
from metatokens.model.block import MLP, MetaTokenBlock
from metatokens.model.masks import TokenLayout
from metatokens.model.memory import Columns, MemoryPolicy
from metatokens.model.modeling import MetaTokenModel, MetaTokenPreTrainedModel
from metatokens.model.positions import Rotary

# google-research/meliad@760591c, folder transformer: transformer_layer.py, nn_components.py, transformer_base.py
INITIAL_STATE_STD, GATE_STD, ID_STD = 0.1, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class BlockRecurrence(SlidingWindow):
    """A sliding window, and the state of one block of the decoder."""

    kind: ClassVar[str] = "block_recurrent"
    num_state_vectors: int
    """S."""
    recurrent_layer: int
    """The block that has the state, counted from 0."""
    gates: str = "skip"
    """Of the state: "skip", one and no feed-forward part; "dual", another for a feed-forward part."""


@strict
class BlockRecurrentConfig(SparseAttentionConfig):
    """Configuration of `BlockRecurrentModel`; `attention_pattern` holds the fields of `BlockRecurrence`."""

    model_type = "metatokens_block_recurrent"
    patterns: ClassVar[dict[str, type[Pattern]]] = {BlockRecurrence.kind: BlockRecurrence}
    default_pattern: ClassVar[dict[str, Any]] = {  # the paper's
        "kind": "block_recurrent",
        "window": 512,
        "num_state_vectors": 512,
        "recurrent_layer": 9,
    }

    @property
    def recurrence(self) -> BlockRecurrence:
        """Return the pattern."""
        pattern = self.pattern
        assert isinstance(pattern, BlockRecurrence)
        return pattern

    @property
    def layer_types(self) -> list[str]:
        """Return the cache layer types; that of the recurrent block carries the state."""
        own = self.recurrence.recurrent_layer
        return [RECURRENT_LAYER if i == own else kind for i, kind in enumerate(super().layer_types)]

    def count_extra_parameters(self) -> int:
        """Count the parameters of the recurrence."""
        of, width, inner = self.recurrence, self.hidden_size, self.intermediate_size
        projections = 5 * (width * width + width) + 2 * width * width + width + width * width
        mlp = 2 * width * inner + inner + width + 3 * width  # with its norm and its gate
        return projections + (2 * of.num_state_vectors + 3) * width + (of.gates == "dual") * mlp

    def count_extra_flops(self, num_positions: int) -> int:
        """Count the operations of the recurrence in a forward pass over T positions."""
        of, width = self.recurrence, self.hidden_size
        num_states, num_windows = of.num_state_vectors, -(-num_positions // of.window)
        reading = 2 * num_positions * (2 * width * width + 2 * num_states * width)
        keys = 2 * num_states * 2 * width * width
        update = 2 * num_states * (4 * width * width + 2 * width * (num_states + of.window))
        update += (of.gates == "dual") * 2 * num_states * 2 * width * self.intermediate_size
        return reading + num_windows * keys + (num_windows - 1) * update

    def count_extra_cache(self) -> int:
        """Count the numbers that a cache carries of a row: state, keys and values of it and of the last window."""
        of = self.recurrence
        assert self.head_dim is not None
        inner = self.num_attention_heads * self.head_dim
        return of.num_state_vectors * self.hidden_size + 2 * (of.num_state_vectors + of.window) * inner

    def validate_recurrence(self) -> None:
        """Check the numbers of the recurrence."""
        of = self.recurrence
        if of.num_state_vectors < 1:
            raise ValueError(f"attention_pattern num_state_vectors must be at least 1, not {of.num_state_vectors}")
        if not 0 <= of.recurrent_layer < self.num_layers:
            raise ValueError(
                f"attention_pattern recurrent_layer {of.recurrent_layer} is outside 0..{self.num_layers - 1}"
            )
        if of.window >= self.max_sequence_length:
            raise ValueError(
                f"attention_pattern window {of.window} must be less than max_position_embeddings "
                f"{self.max_sequence_length}, or no token would read the state"
            )
        if of.gates not in ("skip", "dual"):
            raise ValueError(f'attention_pattern gates must be "skip" or "dual", not {of.gates!r}')


class Windows(NamedTuple):
    """Where new tokens stand in windows, counted from the one in which the last token before them stands."""

    slots: Tensor
    """(B or 1, T) int64: places of the tokens in N windows of W; padding has the spare place N W."""
    counts: Tensor
    """(B or 1,) int64: tokens of a row in these windows, cached ones too."""
    num_windows: int
    """N."""


class Gate(nn.Module):
    """Mixes a state with its change, by a learned share of each dimension ("fixed" in the paper: no input moves it)."""

    def __init__(self, width: int) -> None:
        """Create the bias."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, state: Tensor, change: Tensor) -> Tensor:
        """Return the new state, (B, S, C)."""
        share = self.bias.sigmoid()
        return state * share + change * (1 - share)


class Recurrence(nn.Module):
    """The state: tokens read it, and each finished window changes it."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        """Create the projections of the state, and the second query and output of the tokens."""
        super().__init__()
        of, width = config.recurrence, config.hidden_size
        assert config.head_dim is not None
        self.head_dim, self.window = config.head_dim, of.window
        inner = config.num_attention_heads * config.head_dim
        self.initial_state = nn.Parameter(torch.zeros(of.num_state_vectors, width))
        self.state_ids = nn.Parameter(torch.zeros(of.num_state_vectors, width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.k_proj, self.v_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.q_proj, self.window_q_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.o_proj, self.gate = nn.Linear(2 * inner, width), Gate(width)
        self.token_q_proj, self.token_o_proj = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)
        self.mlp = None
        if of.gates == "dual":
            self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp, self.mlp_gate = MLP(config), Gate(width)

    def forward(
        self, hidden: Tensor, key: Tensor, value: Tensor, windows: Windows, layer: RecurrentDynamicLayer | None
    ) -> Tensor:
        """Return what tokens read from the state, (B, T, C), and carry the state on in the layer of the cache.

        Args:
            hidden: (B, T, C), normed.
            key: (B, H, T, D), without positions.
            value: (B, H, T, D).
            windows: where the tokens stand.
            layer: the cache of this block, or None.
        """
        query = self._heads(self.token_q_proj(hidden))
        keys, values = self._lay_out(key, windows), self._lay_out(value, windows)
        if layer is not None and layer.carried is not None:
            *state, old_keys, old_values, _ = layer.carried
            keys[0], values[0] = keys[0] + old_keys, values[0] + old_values
        else:
            initial = self.initial_state[None]
            state = [part.expand(len(key), *part.shape[1:]) for part in (initial, *self._show(initial))]
        if windows.num_windows == 1:  # no need to lay out the queries
            states, read = [state], _attend(query, state[1], state[2])
            if self.training and torch.is_grad_enabled():
                # in training every process must touch the same parameters
                read = read + 0 * self._update(state, keys[0], values[0])[0].sum()
        else:
            states, parts = [], []
            for number, queries in enumerate(self._lay_out(query, windows)):
                if number:
                    state = self._update(state, keys[number - 1], values[number - 1])
                states.append(state)
                parts.append(_attend(queries, state[1], state[2]))
            slots = windows.slots[:, None, :, None].expand_as(query)
            read = nn.functional.pad(torch.cat(parts, dim=2), (0, 0, 0, 1)).gather(2, slots)
        if layer is not None:
            last = ((windows.counts - 1).clamp(min=0) // self.window).expand(len(key))
            rows = torch.arange(len(key), device=key.device)
            histories = [*zip(*states, strict=True), keys, values]
            newest = [parts[0] if len(parts) == 1 else torch.stack(list(parts))[last, rows] for parts in histories]
            layer.carried = (*newest, windows.counts - last * self.window)
        output: Tensor = self.token_o_proj(read.transpose(1, 2).flatten(2))
        return output

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _lay_out(self, tokens: Tensor, windows: Windows) -> list[Tensor]:
        """Return the windows, each (B, H, W, D), of (B, H, T, D); places without a token are zero."""
        num_places = windows.num_windows * self.window
        laid = tokens.new_zeros((*tokens.shape[:2], num_places + 1, tokens.shape[-1]))
        laid = laid.scatter(2, windows.slots[:, None, :, None].expand_as(tokens), tokens)
        return list(laid[:, :, :num_places].split(self.window, dim=2))

    def _show(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, H, S, D) of a state."""
        named = self.norm(state) + self.state_ids
        return self._heads(self.k_proj(named)), self._heads(self.v_proj(named))

    def _update(self, old: Sequence[Tensor], key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the state, its keys and its values after a window with these keys and values."""
        state, own_key, own_value = old
        named = self.norm(state) + self.state_ids
        of_itself = _attend(self._heads(self.q_proj(named)), own_key, own_value)
        of_window = _attend(self._heads(self.window_q_proj(named)), key, value)
        attended = torch.cat([of_itself, of_window], dim=1).transpose(1, 2).flatten(2)
        state = self.gate(state, self.o_proj(attended))
        if self.mlp is not None:
            state = self.mlp_gate(state, self.mlp(self.mlp_norm(state)))
        return [state, *self._show(state)]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value)


class RecurrentAttention(SparseSelfAttention):
    """Self-attention of a block, with what its tokens read from the state if it is the recurrent one."""

    config: BlockRecurrentConfig

    def __init__(self, config: BlockRecurrentConfig, layer_index: int) -> None:
        """Create the projections."""
        super().__init__(config, layer_index)
        is_recurrent = layer_index == config.recurrence.recurrent_layer
        self.recurrence = Recurrence(config) if is_recurrent else None

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        mask: Any,
        past_key_values: Cache | None = None,
        pools: Any = None,
        windows: Windows | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the sequence (B, T, C) and, with a cache, over what came before it."""
        if self.recurrence is None:
            return super().forward(hidden, rotary, mask, past_key_values, pools, **kwargs)
        assert windows is not None
        query, key, value = self.project(hidden, None)
        layer: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        read = self.recurrence(hidden, key, value, windows, layer)
        query, key = self.place(query, key, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, mask, **kwargs)
        return output + read, weights


class RecurrentBlock(SparseBlock):
    """A block that may be the recurrent one."""

    attention_class: ClassVar[type[SelfAttention]] = RecurrentAttention


class _Recurrent(MetaTokenPreTrainedModel):
    """What both classes of the model share: the config, and the initial weights of the recurrence."""

    config_class = BlockRecurrentConfig
    config: BlockRecurrentConfig
    _no_split_modules: ClassVar[list[str]] = ["RecurrentBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.normal_(module.bias, std=GATE_STD)
        elif isinstance(module, Recurrence):
            init.normal_(module.initial_state, std=INITIAL_STATE_STD)
            init.normal_(module.state_ids, std=ID_STD)
            init.normal_(module.token_o_proj.weight, std=self.config.residual_std)


class BlockRecurrentModel(_Recurrent, SparseAttentionModel):
    """The decoder with a recurrent block."""

    block_class: ClassVar[type[MetaTokenBlock]] = RecurrentBlock

    def _arguments_of_layers(
        self,
        policy: MemoryPolicy | None,
        tokens: Columns | None,
        layout: TokenLayout,
        past_key_values: Cache | None,
    ) -> Sequence[dict[str, Any]]:
        arguments = list(super()._arguments_of_layers(policy, tokens, layout, past_key_values))
        arguments[self.config.recurrence.recurrent_layer] = {"windows": self._find_windows(layout, past_key_values)}
        return arguments

    def _find_windows(self, layout: TokenLayout, past_key_values: Cache | None) -> Windows:
        window, num_tokens = self.config.recurrence.window, layout.position_ids.shape[1]
        before = None
        if past_key_values is not None:
            layers = past_key_values.layers  # none yet in a cache that was made without a config
            layer = layers[self.config.recurrence.recurrent_layer] if layers else None
            if not isinstance(layer, RecurrentDynamicLayer):
                raise ValueError(
                    f"the cache, a {type(past_key_values).__name__}, was not made from this model's config or is "
                    "static, and has no place for the state: use DynamicCache(config=model.config)"
                )
            before = None if layer.carried is None else layer.carried[-1]
        device = layout.position_ids.device
        if layout.attention_mask is None and before is None:  # no need to wait for the device
            counts = torch.full((1,), num_tokens, device=device)
            return Windows(torch.arange(num_tokens, device=device)[None], counts, -(-num_tokens // window))
        is_real = torch.ones((1, num_tokens), dtype=torch.bool, device=device)
        if layout.attention_mask is not None:
            is_real = layout.attention_mask[:, -num_tokens:].bool().to(device)
        slots = is_real.long().cumsum(-1) - 1
        if before is not None:
            slots = slots + before[:, None]
        counts = slots[:, -1] + 1
        num_windows = max(1, -(-int(counts.max()) // window))
        return Windows(torch.where(is_real, slots, num_windows * window), counts, num_windows)


class BlockRecurrentForCausalLM(_Recurrent, SparseAttentionForCausalLM):
    """The language model with a recurrent block."""

    model_class: ClassVar[type[MetaTokenModel]] = BlockRecurrentModel
