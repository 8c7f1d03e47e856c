"""Which tokens see each other: padding, packed documents, masks of the caller's own and the bias of positions.

A `TokenLayout` holds this once per forward pass, for each token. Both attentions make their masks from it, so the same
limits bind both; meta-attention takes only the entries of its members (`take_pairs`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .compatibility import create_causal_mask
from .configuration import MetaTokenConfig
from .position_bias import PositionBias, add_bias

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes indices (batch, head, query column, key column) and tells whether the query sees the key."""


@dataclass(frozen=True)
class TokenLayout:
    """Where the T tokens of a forward pass stand, and which of the K columns (the cache's first) they may see."""

    position_ids: Tensor
    """(B or 1, T) int64: how many tokens of its text stand before each, unless the caller gave others."""
    attention_mask: Any
    """(B, K), 1 = a token; or (B or 1, H or 1, T, K), bool with True = keep or additive; or None: all are tokens."""
    documents: Tensor | None
    """(B or 1, T) int64: the document of each token, where rows hold several; there is no cache then."""
    bias: PositionBias | None
    """What positions add to the scores."""
    table: Tensor | None = None
    """(B or 1, L) int64: where tokens stand, by the numbers in `position_ids`; None if they stand there."""

    @property
    def has_pairs(self) -> bool:
        """Tell whether the caller's mask is over pairs of query and key; it then replaces the causal mask."""
        return self.attention_mask is not None and self.attention_mask.ndim == 4

    def find_real_tokens(self, columns: Tensor) -> Tensor | None:
        """Tell which of the T tokens, at `columns` (T,), are not padding: (B or 1, T) bool, or None if all are real.

        In a mask of pairs, a real token sees itself and padding does not.
        """
        if self.attention_mask is None:
            return None
        if not self.has_pairs:
            is_real: Tensor = self.attention_mask[:, -len(columns) :].bool()
            return is_real
        mask = self.attention_mask[:, 0]
        return is_kept(mask.gather(2, columns[None, :, None].expand(len(mask), -1, 1))[..., 0])

    def place(self, numbers: Tensor) -> Tensor:
        """Return where tokens stand, (B or 1, n), by their numbers (B or 1, n) in `position_ids`."""
        if self.table is None:
            return numbers
        rows = max(len(numbers), len(self.table))
        numbers = numbers.clamp(0, self.table.shape[1] - 1)  # columns of a static cache that hold no token
        return self.table.expand(rows, -1).gather(1, numbers.expand(rows, -1))

    @property
    def positions(self) -> Tensor:
        """Where the T tokens stand, (B or 1, T) int64."""
        return self.place(self.position_ids)

    def key_positions(self, num_columns: int, seen: int | Tensor) -> Tensor:
        """Return where the tokens of all columns stand, (B or 1, K).

        Those in the cache are counted back from the newest token without padding. With a mask of pairs, they count
        only the columns that the newest token sees.
        """
        position_ids, mask = self.position_ids, self.attention_mask
        columns = torch.arange(position_ids.shape[1], device=position_ids.device) + seen
        if mask is None:
            is_token = position_ids.new_ones((1, num_columns))
        else:
            newest = is_kept(mask[:, 0, -1]) if self.has_pairs else mask.bool()
            missing = num_columns - newest.shape[1]  # a static cache has more columns than tokens
            is_token = torch.nn.functional.pad(newest.long(), (0, missing))
        count = is_token.cumsum(-1)
        behind = count.gather(1, columns[None, -1:].expand(len(count), 1)) - count
        positions = position_ids[:, -1:] - behind
        rows = len(positions)
        return self.place(positions.scatter(1, columns.expand(rows, -1), position_ids.expand(rows, -1)))


def check_attention_mask(config: MetaTokenConfig, attention_mask: Any, dtype: torch.dtype) -> Any:
    """Return the caller's mask as the attention of `config` takes it: a mask of pairs is bool, or additive in `dtype`.

    Raises:
        ValueError: for a mask of pairs that the attention cannot take, or a mask of another shape.
    """
    backend = config._attn_implementation
    if attention_mask is None or backend.startswith("paged|"):  # transformers' own, made for its paged cache
        return attention_mask
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be (batch, tokens) or (batch, heads, queries, keys), not {found}")
    if "flash" in backend or "flex" in backend:
        raise ValueError(f'attn_implementation "{backend}" takes no mask of pairs: use "sdpa" or "eager"')
    if attention_mask.is_floating_point():
        return attention_mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    return to_additive(attention_mask.bool(), dtype) if backend == "eager" else attention_mask.bool()


def find_documents(
    config: MetaTokenConfig,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    num_tokens: int,
    past_key_values: Cache | None,
) -> Tensor | None:
    """Number the documents that are packed into rows, as `DataCollatorWithFlattening` packs them.

    A document opens where a position does not exceed the one before it. A row whose positions also leap ahead somewhere
    is taken as one document with unusual positions, as in an ablation of positions.

    Args:
        config: the model's configuration.
        position_ids: (B or 1, T) int64, or None.
        cu_seq_lens: (documents + 1,) int, where the documents of a single row start and end, or None.
        num_tokens: T.
        past_key_values: an empty cache, or None.

    Returns:
        (B or 1, T) int64, or None if each row is one document. While a graph is traced the positions cannot be read:
        without a cache any positions then count as packed, and with a cache none do.

    Raises:
        ValueError: for packed documents with a cache, or with flash attention.
    """
    backend = config._attn_implementation
    if config.memory_policy is not None and config.memory_policy.positions == "text":
        return None  # a meta-token repeats the position before it, which opens no document
    if backend.startswith("paged|") or (past_key_values is not None and is_traced()):
        return None
    if cu_seq_lens is not None:
        columns = torch.arange(num_tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        documents = torch.searchsorted(cu_seq_lens[1:].contiguous(), columns, right=True)[None]
    elif position_ids is not None and num_tokens > 1:
        step = position_ids.diff(dim=-1)
        opens = (step <= 0) & (step <= 1).all(-1, keepdim=True)
        documents = torch.nn.functional.pad(opens.long().cumsum(-1), (1, 0))
    else:
        return None
    if not is_traced() and not documents.any():
        return None
    if past_key_values is not None:
        raise ValueError(
            "position_ids start anew within a row, which packs documents, and a cache cannot keep them apart: leave "
            "past_key_values out, or give attention_mask if the row is one document"
        )
    if "flash" in backend:
        raise ValueError(f'attn_implementation "{backend}" takes no packed documents here: use "sdpa" or "eager"')
    return documents


def is_traced() -> bool:
    """Tell whether a graph is being traced; it must not depend on the values of tensors."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def same_document(documents: Tensor, num_rows: int) -> MaskFunction:
    """Return the pattern that keeps queries within their document, given the documents (B or 1, T) of the columns."""
    documents = documents.expand(num_rows, -1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return documents[batch, query] == documents[batch, key]

    return sees


def make_causal_mask(
    config: MetaTokenConfig,
    hidden: Tensor,
    layout: TokenLayout,
    past_key_values: Cache | None,
    pattern: MaskFunction | None = None,
) -> Any:
    """Return the self-attention mask in the backend's format: causal, without padding, within documents and pattern.

    A mask of pairs takes the place of all of these.
    """
    if layout.documents is not None:
        if pattern is not None:
            raise ValueError("this model's attention takes no packed documents: give it one document a row")
        pattern = same_document(layout.documents, len(hidden))
    # position_ids stay out of this call: transformers would take any that do not rise by one for packed documents
    mask = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=layout.attention_mask,
        past_key_values=past_key_values,
        and_mask_function=pattern,
        allow_is_causal_skip=layout.bias is None,
    )
    if layout.bias is None:
        return mask
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    return add_bias(mask, layout.positions, layout.key_positions(mask.shape[-1], seen), layout.bias)


def take_pairs(mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the entries (B, H or 1, M, K') of a mask of pairs at queries (B, M) and key columns (B, K')."""
    mask = mask.expand(len(queries), -1, -1, -1)
    heads = mask.shape[1]
    rows = mask.gather(2, queries[:, None, :, None].expand(-1, heads, -1, mask.shape[-1]))
    columns = keys.clamp(min=0)[:, None, None]
    return rows.gather(3, columns.expand(-1, heads, queries.shape[1], -1))


def combine_masks(first: Tensor, second: Tensor) -> Tensor:
    """Return the mask of the pairs that both allow, bool if both are bool, else additive."""
    if first.dtype == second.dtype == torch.bool:
        return first & second
    dtype = first.dtype if second.dtype == torch.bool else second.dtype
    return (to_additive(first, dtype) + to_additive(second, dtype)).clamp(min=torch.finfo(dtype).min)


def is_kept(mask: Tensor) -> Tensor:
    """Tell which entries of a mask, bool or additive, are not masked."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def to_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as an additive one, with the lowest finite number where it is False; others unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
