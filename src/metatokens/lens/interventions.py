"""Edits of the meta-tokens of every forward pass, wherever they stand: how interventions act.

An `Edit` of the lens names columns of one known sequence. These find the meta-tokens of each forward pass themselves,
so they serve `generate`, a static cache, the decoder alone and a model in training mode too.

`EdgeRotary` leaves both sides of an edge with a meta-token unrotated. With t = 1 at text, m = 1 - t, r rotated and u
unrotated, the score

    t_q t_k (q_r . k_r) + m_q (q_u . k_u) + t_q m_k (q_u . k_u)

is one product of heads three times as wide, q' = [t q_r, m q_u, t q_u] and k' = [t k_r, k_u, m k_u]: the ordinary
attention functions, masks and caches do the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.lens.hooks import ModuleHooks, named_inputs
from metatokens.model import MetaTokenConfig
from metatokens.model.compatibility import CACHE_NAME, find_cache
from metatokens.model.positions import RotaryTables

if TYPE_CHECKING:
    from transformers import Cache


class MetaTokenHooks(ModuleHooks):
    """The hooks that change a `MetaTokenModel` at its meta-tokens; without one in the input they change no bit."""

    def __init__(
        self,
        decoder: Any,
        *,
        embedding: Tensor | None = None,
        position: Literal["zero", "no_edges"] | None = None,
        silent_layers: Iterable[int] = (),
    ) -> None:
        """Hang them up.

        Args:
            decoder: A `MetaTokenModel`, alone or within a model.
            embedding: (C,), takes the place of a meta-token's embedding, before a learned position is added.
            position: "zero" zeroes the position, "no_edges" removes it from the attention edges.
            silent_layers: Layers whose meta-attention adds nothing; they must have one.
        """
        super().__init__()
        self._embedding = embedding
        self._memory = CacheMemory(decoder.config) if position == "no_edges" else None
        self._is_meta: Tensor | None = None
        self._holds_meta = self._fills_cache = False
        self._hook(decoder, before=self._begin, after=self._end, always=True)
        if embedding is not None:
            self._hook(decoder.embed_tokens, after=self._replace_embeddings)
        if position == "no_edges":
            self._hook(decoder.rotary_emb, after=self._unrotate_edges)
        elif position == "zero" and decoder.config.position_encoding == "learned":
            self._hook(decoder.embed_positions, after=self._zero_learned_positions)
        elif position == "zero":
            self._hook(decoder.rotary_emb, after=self._zero_rotation)
        for layer in silent_layers:
            # biases included
            self._hook(decoder.layers[layer].meta_attn.o_proj, after=lambda _, __, output: torch.zeros_like(output))

    def _begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the meta-tokens as the model does, and tell it, for their embeddings are about to change."""
        inputs = named_inputs(decoder, args, kwargs)
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (input_ids is None) == (embeds is None):
            return None  # the model refuses it
        tokens: Tensor = inputs["inputs_embeds"][..., 0] if input_ids is None else input_ids
        given = inputs.get("meta_token_mask")
        is_meta: Tensor = (
            decoder.find_meta_tokens(input_ids, embeds) if given is None else given.bool().expand(tokens.shape)
        )
        self._is_meta = inputs["meta_token_mask"] = is_meta
        if self._memory is not None:
            past, use_cache = find_cache(inputs), inputs.get("use_cache")
            self._fills_cache = past is not None or (decoder.config.use_cache if use_cache is None else use_cache)
            self._holds_meta = self._memory.holds_meta(past) or bool(is_meta.any())
        if embeds is not None and self._embedding is not None:
            inputs["inputs_embeds"] = self._replace_embeddings(None, None, embeds)
        return (), inputs

    def _end(self, _: Any, __: Any, output: Any) -> None:
        """Remember what the cache holds, and forget the forward pass, even one that raised."""
        cache = getattr(output, CACHE_NAME, None)
        if self._memory is not None and cache is not None:
            self._memory.note(cache, self._holds_meta)
        self._is_meta = None

    def _replace_embeddings(self, _: Any, __: Any, embeds: Tensor) -> Tensor:
        if self._is_meta is None or self._embedding is None:
            return embeds
        return torch.where(self._is_meta[..., None], self._embedding.to(embeds), embeds)

    def _zero_learned_positions(self, _: Any, __: Any, positions: Tensor) -> Tensor:
        return positions if self._is_meta is None else torch.where(self._is_meta[..., None], 0, positions)

    def _zero_rotation(self, rotary_embedding: Any, _: Any, tables: RotaryTables) -> RotaryTables:
        """Make the rotation the identity; YaRN's temperature stays."""
        if self._is_meta is None:
            return tables
        is_meta, scaling = self._is_meta[..., None], rotary_embedding.attention_scaling
        return RotaryTables(torch.where(is_meta, scaling, tables.cos), torch.where(is_meta, 0, tables.sin))

    def _unrotate_edges(self, rotary_embedding: Any, _: Any, tables: RotaryTables) -> Any:
        """Hand the attentions a rotation that knows which tokens are meta-tokens."""
        if self._is_meta is None or not (self._holds_meta or self._fills_cache):
            return tables
        return EdgeRotary(tables, self._is_meta, rotary_embedding.attention_scaling, self._holds_meta)


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
        self._wide = 3 * config.head_dim  # the keys of an `EdgeRotary`
        self._layer = next((i for i in range(config.num_layers) if config.has_positions(i)), 0)
        self._holds_meta: WeakKeyDictionary[Cache, bool] = WeakKeyDictionary()

    def note(self, cache: Cache, holds_meta: bool) -> None:
        """Remember what a cache holds after a forward pass."""
        self._holds_meta[cache] = holds_meta

    def holds_meta(self, cache: Cache | None) -> bool:
        """Tell whether a cache may hold a meta-token; a copy of a cache may."""
        if cache is None or not int(cache.get_seq_length()):
            return False
        width = cache.layers[self._layer].keys.shape[-1]
        if width != self._wide:
            raise UsageError(
                "past_key_values",
                expected=f"keys {self._wide} wide, those of no_position_edges",
                found=f"{width} wide",
                remedy="fill the cache within the same `with intervene(...)`",
            )
        return self._holds_meta.get(cache, True)
