"""How interventions act: hooks around one forward pass of a model, and the rotation that spares edges to meta-tokens.

`interventions.py` says what there is and hangs these on a model. `EdgeRotary` is the algebra of `no_position_edges`.
With t = 1 at text, m = 1 - t, r rotated and u unrotated, the score

    t_q t_k (q_r . k_r) + m_q (q_u . k_u) + t_q m_k (q_u . k_u)

is one product of heads three times as wide, q' = [t q_r, m q_u, t q_u] and k' = [t k_r, k_u, m k_u]: the ordinary
attention functions, masks and caches do the rest.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.model import MetaTokenConfig, MetaTokenModel
from metatokens.model.compatibility import CACHE_NAME, find_cache
from metatokens.model.positions import RotaryTables

if TYPE_CHECKING:
    from transformers import Cache

WIDE_HEADS = 3
"""How many head sizes wide the keys of `no_position_edges` are."""
_INPUTS = tuple(inspect.signature(MetaTokenModel.forward).parameters)[1:]


class CurrentForward:
    """The forward pass that is under way: where its meta-tokens are, and the hooks that use it."""

    def __init__(self, replacement: Tensor | None) -> None:
        self._replacement = replacement
        self.memory: CacheMemory | None = None
        self._is_meta: Tensor | None = None
        self._holds_meta = self._fills_cache = False

    def begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the meta-tokens of the inputs of `MetaTokenModel.forward`, and replace embeddings given as inputs."""
        inputs = dict(zip(_INPUTS, args, strict=False)) | kwargs
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (input_ids is None) == (embeds is None):
            return None  # the model refuses it
        self._is_meta = _find_meta_tokens(decoder.config, inputs)
        if self.memory is not None:
            past, use_cache = find_cache(inputs), inputs.get("use_cache")
            self._fills_cache = past is not None or (decoder.config.use_cache if use_cache is None else use_cache)
            self._holds_meta = self.memory.holds_meta(past) or bool(self._is_meta.any())
        if embeds is not None and self._replacement is not None:
            inputs["inputs_embeds"] = self._replace(embeds)
            return (), inputs
        return None

    def end(self, decoder: Any, args: Any, output: Any) -> None:
        """Remember what the cache holds, and forget the forward pass, even one that raised."""
        del decoder, args
        cache = getattr(output, CACHE_NAME, None)
        if self.memory is not None and cache is not None:
            self.memory.note(cache, self._holds_meta)
        self._is_meta = None

    def replace_embeddings(self, module: Any, args: Any, embeds: Tensor) -> Tensor:
        """Put the replacement into token embeddings (B, T, C) at meta-tokens."""
        del module, args
        return self._replace(embeds)

    def zero_learned_positions(self, module: Any, args: Any, positions: Tensor) -> Tensor:
        """Zero the position embeddings (B or 1, T, C) at meta-tokens."""
        del module, args
        return positions if self._is_meta is None else torch.where(self._is_meta[..., None], 0, positions)

    def zero_rotation(self, rotary_embedding: Any, args: Any, tables: RotaryTables) -> RotaryTables:
        """Make the rotation the identity at meta-tokens; YaRN's temperature stays."""
        del args
        if self._is_meta is None:
            return tables
        is_meta = self._is_meta[..., None]
        scaling = rotary_embedding.attention_scaling
        return RotaryTables(torch.where(is_meta, scaling, tables.cos), torch.where(is_meta, 0, tables.sin))

    def unrotate_edges(self, rotary_embedding: Any, args: Any, tables: RotaryTables) -> Any:
        """Hand the attentions a rotation that knows which tokens are meta-tokens."""
        del args
        if self._is_meta is None or not (self._holds_meta or self._fills_cache):
            return tables
        return EdgeRotary(tables, self._is_meta, rotary_embedding.attention_scaling, self._holds_meta)

    def _replace(self, embeds: Tensor) -> Tensor:
        if self._is_meta is None or self._replacement is None:
            return embeds
        return torch.where(self._is_meta[..., None], self._replacement.to(embeds), embeds)


class EdgeRotary(NamedTuple):
    """RoPE between text tokens alone; see the module's docstring for the algebra."""

    tables: RotaryTables
    is_meta: Tensor
    """(B, T) bool."""
    scaling: float
    """YaRN's temperature, which RoPE puts on queries and keys."""
    holds_meta: bool
    """False while neither this forward pass nor its cache has a meta-token: all scores are those of RoPE."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, H, T, 3D); queries (B, H, T, D) while there is no meta-token."""
        rotated_query, rotated_key = self.tables.apply(query_BHTD, key_BHTD)
        query, key = query_BHTD * self.scaling, key_BHTD * self.scaling
        meta = self.is_meta[:, None, :, None]
        text = ~meta
        wide_key = torch.cat([rotated_key.masked_fill(meta, 0), key, key.masked_fill(text, 0)], dim=-1)
        if not self.holds_meta:
            return rotated_query, wide_key
        of_text, of_meta = query.masked_fill(meta, 0), query.masked_fill(text, 0)
        return torch.cat([rotated_query.masked_fill(meta, 0), of_meta, of_text], dim=-1), wide_key

    def at(self, index_BM: Tensor) -> Self:
        """Return the same for the tokens at `index_BM` of each row."""
        return self._replace(tables=self.tables.at(index_BM), is_meta=self.is_meta.gather(1, index_BM))


class CacheMemory:
    """Which caches hold a meta-token, so that those without one keep the bits of the plain rotation."""

    def __init__(self, config: MetaTokenConfig) -> None:
        assert config.head_dim is not None
        self._wide = WIDE_HEADS * config.head_dim
        self._holds_meta: WeakKeyDictionary[Cache, bool] = WeakKeyDictionary()

    def note(self, cache: Cache, holds_meta: bool) -> None:
        """Remember what a cache holds after a forward pass."""
        self._holds_meta[cache] = holds_meta

    def holds_meta(self, cache: Cache | None) -> bool:
        """Tell whether a cache may hold a meta-token; a copy of a cache may."""
        if cache is None or not int(cache.get_seq_length()):
            return False
        width = cache.layers[0].keys.shape[-1]
        if width != self._wide:
            raise UsageError(
                "past_key_values",
                expected=f"keys {self._wide} wide, those of no_position_edges",
                found=f"{width} wide",
                remedy="fill the cache within the same `with intervene(...)`",
            )
        return self._holds_meta.get(cache, True)


def zero_output(module: Any, args: Any, output: Tensor) -> Tensor:
    """Return zeros for the output of a module, biases included."""
    del module, args
    return torch.zeros_like(output)


def _find_meta_tokens(config: MetaTokenConfig, inputs: dict[str, Any]) -> Tensor:
    """Return where the model's own inputs have meta-tokens, (B, T) bool."""
    input_ids, meta_token_mask = inputs.get("input_ids"), inputs.get("meta_token_mask")
    tokens = inputs["inputs_embeds"][..., 0] if input_ids is None else input_ids
    if meta_token_mask is not None:
        is_meta: Tensor = meta_token_mask.expand(tokens.shape)
        return is_meta
    none = torch.zeros_like(tokens, dtype=torch.bool)
    if input_ids is not None:
        return none if config.meta_token_id is None else input_ids == config.meta_token_id
    meta_indices = inputs.get("meta_indices")
    return none if meta_indices is None else none.scatter(1, meta_indices, True)
