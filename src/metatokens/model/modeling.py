"""`MetaTokenModel` and `MetaTokenForCausalLM`: a GPT-2-shaped decoder with a second attention among its meta-tokens.

Embeddings, positions, masks and the packing of meta-tokens come together here; `block.py` is what each layer does.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, logging
from transformers import initialization as init

from .attention import Attention, SelfAttention
from .block import MLP, MetaTokenBlock
from .compatibility import (
    CACHE_NAME,
    CACHE_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ForCausalLMLoss,
    can_return_tuple,
    capture_outputs,
    merge_with_config_defaults,
    one_cache,
)
from .configuration import BIASES, CROSS, MetaTokenConfig
from .cross_attention import CrossPack, pack_across
from .generation import MetaTokenGenerationMixin
from .loss import IGNORE_INDEX, kept_positions, loss_and_logits, targets_of_labels
from .masks import TokenLayout, check_attention_mask, find_documents, is_traced, make_causal_mask, to_additive
from .memory import CHUNK, Columns, MemoryMask, MemoryPolicy, describe_tokens
from .memory_cache import shared_state
from .memory_compact import CompactMask, largest_distance
from .memory_pooled import Pools, find_pools
from .meta_attention import (
    MetaAttention,
    MetaPack,
    check_cache,
    check_meta_indices,
    choose_members,
    pack_all_tokens,
    pack_meta_tokens,
    refuse_paged_cache,
)
from .outputs import MetaTokenCausalLMOutput, MetaTokenModelOutput
from .position_bias import NUM_BUCKETS, AlibiBias, BucketBias, KerpleKernel, PositionBias, alibi_slopes
from .position_range import table_of_positions
from .position_scores import RelativeKeys
from .positions import ROTARY_EMBEDDINGS, Rotary
from .thoughts import place_in_thought

logger = logging.get_logger(__name__)


class MetaTokenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know, and the initialization of GPT-2."""

    config_class = MetaTokenConfig
    config: MetaTokenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MetaTokenBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": MetaTokenBlock,
        "attentions": SelfAttention,
        "meta_attentions": MetaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.residual_std
        if isinstance(module, Attention):
            init.normal_(module.o_proj.weight, std=std)
        elif isinstance(module, MLP):
            init.normal_(module.down_proj.weight, std=std)
        elif isinstance(module, RelativeKeys):
            init.zeros_(module.content_bias)
            init.zeros_(module.distance_bias)
        elif isinstance(module, KerpleKernel):
            # as in the authors' code: r up to 2, s up to 1
            init.uniform_(module.weight[0], 0, 2)
            init.uniform_(module.weight[1], 0, 1)


class MetaTokenModel(MetaTokenPreTrainedModel):
    """The decoder without its output head."""

    block_class: ClassVar[type[MetaTokenBlock]] = MetaTokenBlock

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the decoder that `config` describes."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.num_positions, config.hidden_size)
        elif config.position_encoding == "t5":
            self.distance_bias = nn.Embedding(NUM_BUCKETS, config.num_attention_heads)
        elif config.position_encoding in ("kerple", "dape_kerple"):
            self.kernel = KerpleKernel(config.num_attention_heads)
        elif config.position_encoding in ROTARY_EMBEDDINGS:
            self.rotary_emb = ROTARY_EMBEDDINGS[config.position_encoding](config=config)
        if config.thought_length is not None:
            self.thought_ends = nn.Embedding(2, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([self.block_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.has_meta_attention = any(config.has_meta_attention(i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        meta_token_mask: Tensor | None = None,
        meta_indices: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MetaTokenModelOutput:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 1 = a token, 0 = padding on either side; or (B or 1, H or 1, T, past + T),
                bool with True = keep or additive, which binds both attentions in place of the causal mask.
            position_ids: (B, T) int64; by default they count the tokens of each row from 0, without padding. With
                neither a mask nor a cache, a position that starts anew opens a document that sees none of the others,
                as with transformers' `DataCollatorWithFlattening`; so does `cu_seq_lens_q` among the other arguments.
            past_key_values: a cache made from this model's config.
            inputs_embeds: (B, T, C) in place of `input_ids`.
            use_cache: return a cache; packed documents have none.
            meta_token_mask: (B, T) bool, True at meta-tokens; by default those with the meta-token's id or, in
                `inputs_embeds`, with its embedding.
            meta_indices: (B, M) int64, from a collator: every row has M meta-tokens. Only M is read, which spares a
                host synchronisation. The places are found in the inputs, so tokens may have been put in front since.
                Ignored unless meta-attention is over meta-tokens or across.
            cache: another name for `past_key_values`.
            **kwargs: passed to the attention function.

        Raises:
            ValueError: for both or neither kind of input, a sequence longer than the model, a mask or cache that
                the attention cannot take, or meta-attention over random tokens without their ids.
        """
        past_key_values = one_cache(past_key_values, cache)
        hidden, meta_token_mask = self._embed(input_ids, inputs_embeds, meta_token_mask)
        if meta_indices is not None and self.config.takes_meta_tokens:
            check_meta_indices(meta_indices, meta_token_mask, must_look=inputs_embeds is not None)
        if past_key_values is not None:
            check_cache(self.config, past_key_values)
        past_key_values = self._usable_cache(past_key_values)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        policy = self.config.memory_policy
        tokens = None
        if policy is not None:
            tokens = self._tokens_of_memory(policy, attention_mask, position_ids, past_key_values, meta_token_mask)
            position_ids = tokens.positions if policy.positions == "text" else position_ids
        layout = self._lay_out(hidden, attention_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q"))
        if use_cache and past_key_values is None and layout.documents is None:
            past_key_values = self._usable_cache(DynamicCache(config=self.config))
        if self.config.thought_length is not None:
            hidden = hidden + self._ends_of_thoughts(meta_token_mask, layout, past_key_values)
        hidden = self._with_positions(hidden, layout)
        rotary, meta_rotary = self._rotations(hidden, layout, tokens)
        mask = None
        if policy is None or not all(map(policy.applies_to, range(len(self.layers)))):
            mask = self._causal_mask(hidden, layout, past_key_values)

        pack = None
        if self.has_meta_attention:
            members = choose_members(
                self.config, input_ids=input_ids, meta_token_mask=meta_token_mask, layout=layout, seen=seen
            )
            pack = self._pack(
                hidden,
                meta_token_mask=members,
                meta_indices=meta_indices if self.config.takes_meta_tokens else None,
                rotary=meta_rotary,
                layout=layout,
                past_key_values=past_key_values,
                mask=mask,
            )
        masks = self._masks_of_layers(mask, hidden, layout, past_key_values, meta_token_mask)
        # before the cache knows the tokens
        arguments = self._arguments_of_layers(policy, tokens, layout, past_key_values)
        if policy is not None and tokens is not None:
            memory = self._mask_of_memory(policy, tokens, hidden, layout, past_key_values)
            masks = [memory if policy.applies_to(i) else mask for i, mask in enumerate(masks)]
        hidden = self.dropout(hidden)
        for layer, layer_mask, own in zip(self.layers, masks, arguments, strict=True):
            hidden = layer(hidden, rotary, layer_mask, pack, past_key_values, **own, **kwargs)
        return MetaTokenModelOutput(
            last_hidden_state=self.norm(hidden), **{CACHE_NAME: past_key_values if use_cache else None}
        )

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, meta_token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = inputs_embeds if input_ids is None else self._embed_ids(input_ids)
        assert hidden is not None
        if meta_token_mask is None:
            meta_token_mask = self.find_meta_tokens(input_ids, hidden)
        return hidden, meta_token_mask.bool()

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Embed ids (B, T); a GPU does not tell of one out of range, and looking there would wait for it."""
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected (batch, tokens) of int64, found {tuple(ids.shape)} of {ids.dtype}")
        try:
            hidden: Tensor = self.embed_tokens(ids)
        except IndexError:
            raise ValueError(
                f"input_ids: expected ids from 0 to {self.config.vocab_size - 1}, found {int(ids.min())} to "
                f"{int(ids.max())}; does the tokenizer belong to the model?"
            ) from None
        return hidden

    def _usable_cache(self, cache: Cache | None) -> Cache | None:
        """Return the cache, or None where the backward pass runs the layers again: they would fill it twice."""
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        num_cached = int(cache.get_seq_length())
        if num_cached:
            raise ValueError(
                f"training with gradient checkpointing needs an empty cache, not one of {num_cached} tokens"
            )
        logger.warning_once("Caching is incompatible with gradient checkpointing: the cache is left empty.")
        return None

    def find_meta_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Tell which of the tokens, given as ids (B, T) or as embeddings (B, T, C), are meta-tokens: (B, T) bool."""
        meta_token_id = self.config.meta_token_id
        if input_ids is not None:
            return (
                torch.zeros_like(input_ids, dtype=torch.bool) if meta_token_id is None else input_ids == meta_token_id
            )
        assert inputs_embeds is not None
        if meta_token_id is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        # as Llava finds the placeholders of its images
        embedding = self.embed_tokens(torch.full((1, 1), meta_token_id, device=inputs_embeds.device))
        is_meta: Tensor = (inputs_embeds == embedding).all(-1)
        return is_meta

    def _lay_out(
        self,
        hidden: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        cu_seq_lens: Tensor | None,
    ) -> TokenLayout:
        """Gather the limits on the attention of (B, T, C), after a check that the sequence fits the model."""
        num_tokens = hidden.shape[1]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        attention_mask = check_attention_mask(self.config, attention_mask, hidden.dtype)
        documents = None
        if attention_mask is None and isinstance(seen, int) and seen == 0:
            documents = find_documents(self.config, position_ids, cu_seq_lens, num_tokens, past_key_values)
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
            else:
                position_ids = (torch.arange(num_tokens, device=hidden.device) + seen)[None]
        # columns exceed the window where documents are packed or padding is long; only then are positions read. A
        # static cache counts on the device; generation checks its length beforehand
        if isinstance(seen, int) and seen + num_tokens > self.config.max_sequence_length and not is_traced():
            self.config.check_length(int(position_ids.max()) + 1)
        table = table_of_positions(self.config, position_ids, len(hidden), seen=seen, draws=self.training)
        return TokenLayout(position_ids, attention_mask, documents, self._position_bias(hidden), table)

    def _position_bias(self, hidden: Tensor) -> PositionBias | None:
        encoding = self.config.position_encoding
        if encoding not in BIASES:
            return None
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f'position_encoding "{encoding}" needs attn_implementation "eager" or "sdpa", not '
                f'"{self.config._attn_implementation}"'
            )
        if encoding == "t5":
            return BucketBias(self.distance_bias.weight.to(hidden.dtype))
        if "kerple" in encoding:
            bias: PositionBias = self.kernel(hidden.dtype)
            return bias
        slopes = alibi_slopes(self.config.num_attention_heads)
        return AlibiBias(torch.tensor(slopes, dtype=hidden.dtype, device=hidden.device))

    def _causal_mask(self, hidden: Tensor, layout: TokenLayout, past_key_values: Cache | None) -> Any:
        return make_causal_mask(self.config, hidden, layout, past_key_values)

    def _masks_of_layers(
        self,
        mask: Any,
        hidden: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
        meta_token_mask: Tensor,
    ) -> Sequence[Any]:
        """Return the mask of each block's self-attention; a subclass may narrow the causal one."""
        del hidden, layout, past_key_values, meta_token_mask
        return [mask] * len(self.layers)

    def _tokens_of_memory(
        self,
        policy: MemoryPolicy,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        meta_token_mask: Tensor,
    ) -> Columns:
        """Describe the new tokens (B, T) by what the cache knows of those before them."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("memory mode makes its own mask: give attention_mask as (batch, tokens), 0 at padding")
        num_tokens = meta_token_mask.shape[1]
        is_real = None if attention_mask is None else attention_mask[:, -num_tokens:].bool()
        state = shared_state(policy, past_key_values)
        before = None if state is None else state.counts
        return describe_tokens(policy, meta_token_mask, is_real, position_ids=position_ids, before=before)

    def _arguments_of_layers(
        self,
        policy: MemoryPolicy | None,
        tokens: Columns | None,
        layout: TokenLayout,
        past_key_values: Cache | None,
    ) -> Sequence[dict[str, Any]]:
        """Return each block's arguments of its own, such as what its anchors average; a subclass may have others."""
        del layout
        pools = None
        if policy is not None and tokens is not None:
            pools = self._pools_of_memory(policy, tokens, past_key_values)
        if policy is None or pools is None:
            return [{}] * len(self.layers)
        return [{"pools": pools} if policy.applies_to(i) else {} for i in range(len(self.layers))]

    def _pools_of_memory(self, policy: MemoryPolicy, tokens: Columns, past_key_values: Cache | None) -> Pools | None:
        """Return what the anchors among new tokens average, if they do."""
        if policy.anchors != "pooled":
            return None
        state = shared_state(policy, past_key_values)
        return find_pools(policy, tokens, None if state is None else state.columns)

    def _mask_of_memory(
        self,
        policy: MemoryPolicy,
        tokens: Columns,
        hidden: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
    ) -> Any:
        """Return the mask of the layers in memory mode in the backend's format, and tell the cache what stays."""
        backend = self.config._attn_implementation
        if backend not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f'memory mode needs attn_implementation "sdpa", "eager" or "flex_attention", not "{backend}"'
            )
        if layout.documents is not None:
            raise ValueError("memory mode takes one document a row: leave out position_ids that start anew")
        tokens = replace(tokens, positions=layout.position_ids.expand(tokens.shape))
        state = shared_state(policy, past_key_values)
        if policy.positions == "compact":
            self._check_compact(policy, tokens)  # first: a refused pass must leave the cache as it was
            keys = tokens if state is None else state.read(tokens)
            return CompactMask(policy, tokens, keys, rotate=lambda positions: self.rotary_emb(hidden, positions))
        is_first = state is None or state.columns is None
        causal = make_causal_mask(self.config, hidden, layout, past_key_values) if is_first else None
        keys = tokens if state is None else state.read(tokens)
        mask = MemoryMask(policy, tokens, keys, layout.bias)
        if is_first and not is_traced() and mask.sees_all_before():
            return causal  # the plain model, to the bit
        num_queries = tokens.shape[1]
        if backend == "flex_attention" or (backend == "sdpa" and num_queries > CHUNK and not is_traced()):
            return mask
        return to_additive(mask.dense(), hidden.dtype) if backend == "eager" else mask.dense()

    def _ends_of_thoughts(self, meta_token_mask: Tensor, layout: TokenLayout, past_key_values: Cache | None) -> Tensor:
        """Return what is added to the embeddings (B, T, C) of the first and the last meta-token of each thought."""
        columns = torch.arange(meta_token_mask.shape[1], device=meta_token_mask.device)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        is_real = layout.find_real_tokens(columns + seen)
        is_meta = meta_token_mask if is_real is None else meta_token_mask & is_real
        place = place_in_thought(self.config, is_meta, layout.documents, past_key_values)
        start, end = self.thought_ends.weight[:, None, None]
        last = (self.config.thought_length or 0) + 1
        return torch.where((place == 0)[..., None], start, 0) + torch.where((place == last)[..., None], end, 0)

    def _with_positions(self, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Return the embeddings (B, T, C) as they enter the first block."""
        if self.config.position_encoding == "learned":
            return hidden + self.embed_positions(layout.positions)  # type: ignore[no-any-return]
        if self.config.position_encoding == "transformer_xl":
            # Csordas et al. 2021: embeddings of so small an initialisation would drown in what is added to them
            return hidden * math.sqrt(self.config.hidden_size)
        return hidden

    def _rotations(
        self, hidden: Tensor, layout: TokenLayout, tokens: Columns | None
    ) -> tuple[Rotary | None, Rotary | None]:
        """Return how positions enter self-attention and meta-attention; a compact mask rotates by itself."""
        if self.config.position_encoding not in ROTARY_EMBEDDINGS:
            return None, None
        policy = self.config.memory_policy
        if policy is not None and tokens is not None and policy.positions == "compact":
            return None, self.rotary_emb(hidden, tokens.rank)
        rotary = self.rotary_emb(hidden, layout.positions)
        return rotary, rotary

    def _check_compact(self, policy: MemoryPolicy, tokens: Columns) -> None:
        if self.config._attn_implementation != "sdpa" or is_traced():
            raise ValueError('memory.positions "compact" needs attn_implementation "sdpa", without torch.compile')
        distance = largest_distance(policy, tokens)
        if distance >= self.config.max_position_embeddings:
            raise ValueError(
                f"the memory holds anchors at {distance} positions, and the model has "
                f"{self.config.max_position_embeddings} (max_position_embeddings): set memory.memory_limit"
            )

    def _pack(self, hidden: Tensor, *, mask: Any, **inputs: Any) -> MetaPack | CrossPack | None:
        if self.config.meta_attention_over == "all":
            refuse_paged_cache(self.config)
            past = inputs["past_key_values"]
            seen = past.get_seq_length() if past is not None else 0
            return pack_all_tokens(hidden, rotary=inputs["rotary"], mask=mask, seen=seen)
        pack = pack_across if self.config.meta_attention_over in CROSS else pack_meta_tokens
        # while training, a batch without meta-tokens still touches the meta parameters (see `always`)
        return pack(self.config, hidden, always=self.training and torch.is_grad_enabled(), **inputs)


class MetaTokenForCausalLM(MetaTokenPreTrainedModel, MetaTokenGenerationMixin):
    """The language model; its generation never samples the meta-token."""

    model_class: ClassVar[type[MetaTokenModel]] = MetaTokenModel
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    makes_logits_in_training: bool = False
    """Set it to get logits from training steps with labels too, for a loss of your own. By default such a step makes
    none, which saves most of its memory."""
    _has_checked_labels: bool = False

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the model that `config` describes."""
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # saved with the model, for programs that generate without this class
        self.generation_config.suppress_tokens = self._ids_never_sampled() or None

    @can_return_tuple
    def forward(  # noqa: PLR0913, PLR0917, D417 - transformers sets the arguments; the others are the decoder's
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        meta_token_mask: Tensor | None = None,
        meta_indices: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MetaTokenCausalLMOutput:
        """Run the model; the arguments of `MetaTokenModel.forward`, and these.

        Args:
            labels: (B, T) int64 aligned with the inputs; -100 and meta-tokens are not targets. Whoever counts targets,
                as Trainer does, must put -100 at meta-tokens before; a model warns if its first batch does not.
            shift_labels: (B, T) int64, what each position must predict; takes the place of `labels`.
            logits_to_keep: number of positions at the end whose logits are made (0 means all), or the indices of those
                positions.
            num_items_in_batch: divisor of the summed loss; by default the number of valid targets.

        Returns:
            The loss in nats, and logits (B, T, V) unless the model is training with labels and
            `makes_logits_in_training` is not set. A `loss_function` of the user's own is called as in transformers,
            with all logits, labels and shift_labels.
        """
        # not in the signature: Trainer requires a batch to have every argument with "label" in its name
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        if labels is not None and meta_token_mask is None and (input_ids is None) != (inputs_embeds is None):
            meta_token_mask = self.model.find_meta_tokens(input_ids, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            meta_token_mask=meta_token_mask,
            meta_indices=meta_indices,
            **kwargs,
        )
        if labels is not None:
            assert meta_token_mask is not None  # or the decoder has refused its inputs
            is_meta = meta_token_mask.bool()
            if shift_labels is None and num_items_in_batch is not None:
                self._check_labels(labels, is_meta)
            labels = labels.masked_fill(is_meta, IGNORE_INDEX)
            if shift_labels is None:
                documents = None
                if attention_mask is None and one_cache(past_key_values, cache) is None:
                    cu_seq_lens = kwargs.get("cu_seq_lens_q")
                    documents = find_documents(self.config, position_ids, cu_seq_lens, labels.shape[1], None)
                shift_labels = targets_of_labels(labels, is_meta, self.config.loss_policy, documents)
        loss, logits = self._predict(
            outputs.last_hidden_state, labels, shift_labels, logits_to_keep, num_items_in_batch
        )
        return MetaTokenCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            meta_attentions=outputs.meta_attentions,
            **{CACHE_NAME: outputs.cache},
        )

    def _check_labels(self, labels: Tensor, is_meta: Tensor) -> None:
        """Warn in the first step whose divisor may count labels that are no targets; later checks would cost a wait."""
        if self._has_checked_labels or torch.compiler.is_compiling():
            return
        self._has_checked_labels = True
        if bool(((labels != IGNORE_INDEX) & is_meta).any()):
            logger.warning(
                "Labels stand at meta-tokens, which are no targets. If num_items_in_batch counts them, as that of "
                "Trainer does, the loss comes out too low by their share. Put -100 there, as MetaTokenCollator does."
            )

    def _predict(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the loss and the logits of final hidden states (B, T, C), as `forward` says."""
        if shift_labels is None or self.loss_function is ForCausalLMLoss:
            return loss_and_logits(
                self.lm_head,
                hidden,
                shift_labels,
                vocab_size=self.config.vocab_size,
                wants_logits=self.makes_logits_in_training or not self.training,
                logits_to_keep=logits_to_keep,
                num_items_in_batch=num_items_in_batch,
            )
        logits = self.lm_head(hidden)
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
        )
        return loss, logits[:, kept_positions(logits_to_keep)]


# Trainer's label smoother shifts logits and labels for the classes in this mapping, and for no others
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MetaTokenConfig.model_type] = MetaTokenForCausalLM.__name__
