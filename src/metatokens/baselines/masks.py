"""Sparse patterns of the causal self-attention: sliding window, blockwise, Longformer, BigBird, GPT-Neo's local layers.

A pattern decides by columns whether a query sees a key; causality and padding apply on top. Positions count the real
tokens of a row from the start of the sequence, so neither padding nor a cache shifts them. Every query sees itself. The
keys of all tokens stay in the cache.

Under sdpa a long text is attended to in blocks of queries, each over the keys that it may see
(`metatokens.baselines.blocks`), and flex attention skips the blocks in which no query sees a key. Eager, the reference,
visits every pair; so do a compiled model, a static cache and dropout of attention weights.

Sources: Beltagy et al. 2020 (Longformer), Zaheer et al. 2020 (BigBird), Sun et al. 2022 (blockwise causal attention),
transformers' GPT-Neo (`window_size`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import Cache

from metatokens.baselines.blocks import SHORTEST, BlockPlan, PlacedBias, attend_in_blocks, plan_blocks
from metatokens.baselines.cache import MARKED_LAYER, mark_meta_tokens, real_tokens
from metatokens.model.attention import SelfAttention
from metatokens.model.block import MetaTokenBlock
from metatokens.model.configuration import ADAPTIVE, MetaTokenConfig
from metatokens.model.masks import MaskFunction, TokenLayout, is_traced, make_causal_mask
from metatokens.model.meta_attention import hash_integers
from metatokens.model.modeling import MetaTokenForCausalLM, MetaTokenModel


@dataclass(frozen=True)
class Columns:
    """What a pattern knows about the columns of a batch."""

    positions: Tensor
    """(B, K) int64: how many real tokens come before each column; -1 at padding before the first."""
    is_meta: Tensor
    """(B, K) bool."""

    @property
    def num_columns(self) -> int:
        """K: columns in the cache and in this forward pass."""
        return self.is_meta.shape[1]


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """Base of the patterns."""

    kind: ClassVar[str]
    layers: Literal["all", "odd"] | Sequence[int] = "all"
    """Blocks with the pattern; the others see everything. "odd" alternates as GPT-Neo does."""

    def applies_to(self, layer_index: int) -> bool:
        """Tell whether block `layer_index` has the pattern."""
        if isinstance(self.layers, str):
            return self.layers == "all" or layer_index % 2 == 1
        return layer_index in self.layers

    @abstractmethod
    def mask_function(self, columns: Columns, layer_index: int) -> MaskFunction:
        """Return the pattern of a block."""

    def keys_function(self, columns: Columns, layer_index: int) -> Callable[[Tensor], Tensor]:
        """Return what tells which columns some of the queries may see, from (n,) int64 to (K,) bool.

        It may name too many but none too few. This one visits every pair; a pattern overrides it to be faster.
        """
        sees = self.mask_function(columns, layer_index)
        rows, keys = torch.arange(len(columns.positions))[:, None, None], torch.arange(columns.num_columns)
        return lambda queries: sees(rows, rows, queries[:, None], keys).flatten(0, 1).any(0)

    def sees_everything(self, columns: Columns) -> Tensor:
        """Tell which queries see every earlier key in some row, (K,) bool; they would widen the blocks of others."""
        return torch.zeros_like(columns.is_meta[0])


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """A query at i sees keys j in (i - window, i]."""

    kind: ClassVar[str] = "sliding_window"
    window: int

    def mask_function(self, columns: Columns, layer_index: int) -> MaskFunction:
        """Return the pattern, the same for every block."""
        del layer_index
        positions = columns.positions

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            return positions[batch, key] > positions[batch, query] - self.window

        return sees

    def keys_function(self, columns: Columns, layer_index: int) -> Callable[[Tensor], Tensor]:
        """Return the keys in the window of the earliest of the queries."""
        del layer_index
        positions = columns.positions
        return lambda queries: (positions > positions[:, queries].amin(1, keepdim=True) - self.window).any(0)


@dataclass(frozen=True, kw_only=True)
class Blockwise(Pattern):
    """A query sees its own block and the one before it, of blocks of half the window each.

    Sun et al. 2022: a model trained with full attention on texts as long as the window reads longer ones
    so, for no query sees more keys than in training. A text within the window is seen whole.
    """

    kind: ClassVar[str] = "blockwise"
    window: int
    """Two blocks."""

    def mask_function(self, columns: Columns, layer_index: int) -> MaskFunction:
        """Return the pattern, the same for every block of the model."""
        del layer_index
        blocks = self._blocks(columns)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            return blocks[batch, key] >= blocks[batch, query] - 1

        return sees

    def keys_function(self, columns: Columns, layer_index: int) -> Callable[[Tensor], Tensor]:
        """Return the keys from the block before that of the earliest of the queries on."""
        del layer_index
        blocks = self._blocks(columns)
        return lambda queries: (blocks >= blocks[:, queries].amin(1, keepdim=True) - 1).any(0)

    def _blocks(self, columns: Columns) -> Tensor:
        return columns.positions.clamp(min=0) // (self.window // 2)


@dataclass(frozen=True, kw_only=True)
class Longformer(SlidingWindow):
    """A sliding window, and global tokens: every later query sees them, and they see everything before them."""

    kind: ClassVar[str] = "longformer"
    num_global_tokens: int
    """Global tokens at the start of the sequence."""
    meta_tokens_are_global: bool

    def mask_function(self, columns: Columns, layer_index: int) -> MaskFunction:
        """Return the pattern, the same for every block."""
        in_window = super().mask_function(columns, layer_index)
        is_global = self._is_global(columns)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return in_window(batch, head, query, key) | is_global[batch, query] | is_global[batch, key]

        return sees

    def keys_function(self, columns: Columns, layer_index: int) -> Callable[[Tensor], Tensor]:
        """Return the keys in the window of the earliest of the queries, and the global ones."""
        in_window = super().keys_function(columns, layer_index)
        is_global = self.sees_everything(columns)
        return lambda queries: in_window(queries) | is_global

    def sees_everything(self, columns: Columns) -> Tensor:
        """Tell which columns are global in some row."""
        return self._is_global(columns).any(0)

    def _is_global(self, columns: Columns) -> Tensor:
        is_first = (columns.positions >= 0) & (columns.positions < self.num_global_tokens)
        return is_first | columns.is_meta if self.meta_tokens_are_global else is_first


@dataclass(frozen=True, kw_only=True)
class BigBird(Pattern):
    """Attention by blocks: a block sees a window of blocks, the first blocks, and a few past blocks drawn at random.

    The random blocks of a query's block are drawn without replacement among the past blocks that it would not see
    otherwise. They depend on the seed, the layer and the block alone, so they are the same in training and evaluation,
    and a longer sequence only adds to them.
    """

    kind: ClassVar[str] = "bigbird"
    block_size: int
    window_blocks: int
    """Blocks of the window: the query's own and the ones right before it."""
    num_global_blocks: int
    """Blocks at the start that every later query sees; causally they see everything anyway."""
    num_random_blocks: int
    seed: int

    def mask_function(self, columns: Columns, layer_index: int) -> MaskFunction:
        """Return the pattern of a block."""
        blocks, table = self._blocks(columns, layer_index)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            return table[blocks[batch, query], blocks[batch, key]]

        return sees

    def keys_function(self, columns: Columns, layer_index: int) -> Callable[[Tensor], Tensor]:
        """Return the keys of all blocks that a block of the queries sees."""
        blocks, table = self._blocks(columns, layer_index)
        return lambda queries: table[blocks[:, queries]].any(1).gather(1, blocks).any(0)

    def _blocks(self, columns: Columns, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return the block of each column, (B, K), and which blocks each block sees."""
        num_blocks = -(-columns.num_columns // self.block_size)
        # padding on the left falls into block 0; the padding mask hides it
        blocks = columns.positions.clamp(min=0) // self.block_size
        return blocks, self.visible_blocks(num_blocks, layer_index, blocks.device)

    def visible_blocks(self, num_blocks: int, layer_index: int, device: torch.device | None = None) -> Tensor:
        """Return which blocks each block sees, (blocks, blocks) bool."""
        number = torch.arange(num_blocks, device=device)
        query, key = number[:, None], number
        is_seen = (key > query - self.window_blocks) | (key < self.num_global_blocks)
        is_candidate = ~is_seen & (key < query)
        source = torch.tensor([self.seed, layer_index], device=device)
        draws = hash_integers(source[0], source[1], query, key).double()  # exact: 32 bits
        ranks = torch.where(is_candidate, draws, math.inf).argsort(dim=-1, stable=True).argsort(-1)
        visible: Tensor = (is_seen | (is_candidate & (ranks < self.num_random_blocks))) & (key <= query)
        return visible


PATTERNS: dict[str, type[Pattern]] = {
    pattern.kind: pattern for pattern in (SlidingWindow, Blockwise, Longformer, BigBird)
}


@strict
class SparseAttentionConfig(MetaTokenConfig):
    """Configuration of `SparseAttentionModel`; `attention_pattern` holds the fields of a pattern and its `kind`."""

    model_type = "metatokens_sparse"

    patterns: ClassVar[dict[str, type[Pattern]]] = PATTERNS
    default_pattern: ClassVar[dict[str, Any]] = {"kind": "sliding_window", "window": 256}  # GPT-Neo

    meta_attention_layers: str | list[int] = "none"
    attention_pattern: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the fields that follow from others."""
        if self.attention_pattern is None:
            self.attention_pattern = dict(self.default_pattern)
        super().__post_init__(**kwargs)

    @property
    def pattern(self) -> Pattern:
        """Return the pattern.

        Raises:
            ValueError: for an unknown kind or fields that are not those of the kind.
        """
        fields = dict(self.attention_pattern or {})
        kind = fields.pop("kind", None)
        if kind not in self.patterns:
            raise ValueError(f"attention_pattern kind must be one of {sorted(self.patterns)}, not {kind!r}")
        try:
            return self.patterns[kind](**fields)
        except TypeError as error:
            raise ValueError(f"attention_pattern {kind}: {error}") from None

    @property
    def layer_types(self) -> list[str]:
        """Return the cache layer types; where meta-tokens are global, the first layer remembers them."""
        types = super().layer_types
        pattern = self.pattern
        if isinstance(pattern, Longformer) and pattern.meta_tokens_are_global:
            return [MARKED_LAYER, *types[1:]]
        return types

    def count_attention_pairs(self, layer_index: int, num_positions: int, num_meta: int) -> int:
        """Count the pairs that the pattern allows; global meta-tokens count as if they were evenly spaced."""
        if not self.pattern.applies_to(layer_index):
            return super().count_attention_pairs(layer_index, num_positions, num_meta)
        is_meta = torch.zeros(1, num_positions, dtype=torch.bool)
        is_meta[0, torch.arange(1, num_meta + 1) * num_positions // max(num_meta, 1) - 1] = True
        columns = Columns(torch.arange(num_positions)[None], is_meta)
        sees = self.pattern.mask_function(columns, layer_index)
        zero, key = torch.zeros((), dtype=torch.long), torch.arange(num_positions)
        total = 0
        for query in key.split(1024):
            total += int((sees(zero, zero, query[:, None], key) & (key <= query[:, None])).sum())
        return total

    def validate_pattern(self) -> None:
        """Check the kind and the numbers of the pattern."""
        if self.position_encoding in ADAPTIVE:
            raise ValueError(f"a sparse pattern does not take position_encoding {self.position_encoding!r}")
        for name, value in asdict(self.pattern).items():
            lowest = 1 if name in ("window", "block_size", "window_blocks") else 0
            if isinstance(value, int) and value < lowest:
                raise ValueError(f"attention_pattern {name} must be at least {lowest}, not {value}")
        if isinstance(self.pattern, Blockwise) and self.pattern.window % 2:
            raise ValueError(f"attention_pattern window must be even, two blocks, not {self.pattern.window}")


class SparseSelfAttention(SelfAttention):
    """Self-attention whose mask may be a plan of blocks."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected output (B, T, C), and weights only if the backend returns them."""
        if not isinstance(mask, BlockPlan):
            return super().attend(query, key, value, mask, **kwargs)
        if key.shape[-1] > query.shape[-1]:
            key = key[..., : query.shape[-1]]
        return self.o_proj(attend_in_blocks(query, key, value, mask, self.scaling).flatten(2)), None


class SparseBlock(MetaTokenBlock):
    """A block whose self-attention takes plans."""

    attention_class: ClassVar[type[SelfAttention]] = SparseSelfAttention


class SparseAttentionModel(MetaTokenModel):
    """The decoder whose self-attention follows a pattern."""

    config_class = SparseAttentionConfig
    config: SparseAttentionConfig
    block_class: ClassVar[type[MetaTokenBlock]] = SparseBlock
    _no_split_modules: ClassVar[list[str]] = ["SparseBlock"]
    _supports_flash_attn = False

    def _masks_of_layers(
        self,
        mask: Any,
        hidden: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
        meta_token_mask: Tensor,
    ) -> Sequence[Any]:
        pattern = self.config.pattern
        columns = self._columns(layout, past_key_values, meta_token_mask, pattern)
        masks: list[Any] = []
        shared = None
        for layer_index in range(len(self.layers)):
            if not pattern.applies_to(layer_index):
                masks.append(mask)
                continue
            if shared is None or isinstance(pattern, BigBird):
                if self._takes_blocks(hidden, past_key_values):
                    shared = self._plan(hidden, layout, columns, layer_index)
                else:
                    function = pattern.mask_function(columns, layer_index)
                    shared = make_causal_mask(self.config, hidden, layout, past_key_values, function)
            masks.append(shared)
        return masks

    def _causal_mask(self, hidden: Tensor, layout: TokenLayout, past_key_values: Cache | None) -> Any:
        takes_all = self.has_meta_attention and self.config.meta_attention_over == "all"
        if takes_all or not all(self.config.pattern.applies_to(index) for index in range(len(self.layers))):
            return super()._causal_mask(hidden, layout, past_key_values)
        return None  # no layer takes it

    def _takes_blocks(self, hidden: Tensor, past_key_values: Cache | None) -> bool:
        is_static = past_key_values is not None and past_key_values.is_compileable
        drops = self.training and self.config.attention_dropout > 0
        is_long = hidden.shape[1] >= SHORTEST
        return is_long and self.config._attn_implementation == "sdpa" and not (is_static or drops or is_traced())

    def _plan(self, hidden: Tensor, layout: TokenLayout, columns: Columns, layer_index: int) -> BlockPlan:
        num_queries = hidden.shape[1]
        # rows that are alike count as one; the plan's shapes depend on values, so it is made on the host
        rows = slice(1 if layout.attention_mask is None and not columns.is_meta.any() else None)
        is_real = real_tokens(layout, columns.is_meta)[rows].cpu()
        columns = Columns(columns.positions[rows].cpu(), columns.is_meta[rows].cpu())
        placed = None
        if layout.bias is not None:
            key_positions = layout.key_positions(columns.num_columns, columns.num_columns - num_queries)
            placed = PlacedBias(layout.positions.cpu(), key_positions.cpu(), layout.bias.to("cpu"))
        pattern = self.config.pattern
        return plan_blocks(
            pattern.mask_function(columns, layer_index),
            pattern.keys_function(columns, layer_index),
            is_real,
            num_queries,
            sees_everything=pattern.sees_everything(columns),
            placed=placed,
            device=hidden.device,
        )

    def _columns(
        self,
        layout: TokenLayout,
        past_key_values: Cache | None,
        meta_token_mask: Tensor,
        pattern: Pattern,
    ) -> Columns:
        num_columns = meta_token_mask.shape[1]
        if past_key_values is not None:
            num_columns, _ = past_key_values.get_mask_sizes(num_columns, 0)
        if isinstance(pattern, Longformer) and pattern.meta_tokens_are_global:
            is_meta = mark_meta_tokens(meta_token_mask, past_key_values)
        else:
            is_meta = meta_token_mask.new_zeros((meta_token_mask.shape[0], num_columns))
        return Columns(real_tokens(layout, is_meta).long().cumsum(-1) - 1, is_meta)


class SparseAttentionForCausalLM(MetaTokenForCausalLM):
    """The language model whose self-attention follows a pattern."""

    config_class = SparseAttentionConfig
    model_class: ClassVar[type[MetaTokenModel]] = SparseAttentionModel
    _no_split_modules: ClassVar[list[str]] = ["SparseBlock"]
    _supports_flash_attn = False

    @staticmethod
    def create_masks_for_generate(
        config: MetaTokenConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Leave the mask of `generate` with a static cache as it is: each block makes its own from it."""
        del config, inputs_embeds, past_key_values, position_ids, cache, kwargs
        return attention_mask
