"""`MetaTokenModel` and `MetaTokenForCausalLM`: a GPT-2-shaped decoder with a second attention among its meta-tokens.

Paper section 3 and appendix: causal self-attention, meta-attention, feed-forward, in every layer.
Deviation: pre-norm, each of the three sub-layers with its own norm and residual, and GELU, as in nanoGPT.
Deviation: the norm before meta-attention has no parameters. An affine norm before linear projections with biases adds
nothing that they cannot hold, and the model has exactly the paper's 152M parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention, SelfAttention
from .configuration import MetaTokenConfig
from .generation import MetaTokenGenerationMixin
from .loss import IGNORE_INDEX, summed_cross_entropy, targets_of_labels
from .meta_attention import MetaAttention, MetaPack, choose_members, pack_all_tokens, pack_meta_tokens
from .outputs import MetaTokenCausalLMOutput, MetaTokenModelOutput
from .positions import MetaTokenRotaryEmbedding, Rotary, XposRotaryEmbedding, add_alibi, alibi_slopes

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Tells of (batch, head, query column, key column), each an index, whether the query sees the key."""


class MLP(nn.Module):
    """Feed-forward sub-layer."""

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the two projections, with biases as in GPT-2."""
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden)))
        return output


class MetaTokenBlock(GradientCheckpointingLayer):
    """Self-attention, meta-attention over the meta rows, feed-forward; each with its own norm and residual."""

    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: MetaTokenConfig, layer_index: int) -> None:
        """Create the block; one without meta-attention has no meta parameters."""
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = self.attention_class(config, layer_index)
        self.meta_attn = None
        if config.has_meta_attention(layer_index):
            self.meta_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
            self.meta_attn = MetaAttention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None = None,
        mask: Any = None,
        pack: MetaPack | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map hidden states (B, T, C) to (B, T, C)."""
        update, _ = self.self_attn(self.input_layernorm(hidden), rotary, mask, past_key_values, **kwargs)
        hidden = hidden + self.dropout(update)
        if self.meta_attn is not None and pack is not None:
            hidden = self.add_meta_attention(hidden, pack, past_key_values)
        output: Tensor = hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))
        return output

    def add_meta_attention(self, hidden: Tensor, pack: MetaPack, past_key_values: Cache | None) -> Tensor:
        """Add the meta-attention of the meta rows to those rows of (B, T, C)."""
        assert self.meta_attn is not None
        update, _ = self.meta_attn(self.meta_layernorm(pack.gather(hidden)), pack, past_key_values)
        return pack.add(hidden, self.dropout(update))


class MetaTokenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know, and the initialization of GPT-2."""

    config_class = MetaTokenConfig
    config: MetaTokenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MetaTokenBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
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
        # GPT-2, section 2.3: what adds to the residual stream starts smaller by the root of the number of additions
        std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, Attention):
            init.normal_(module.o_proj.weight, std=std)
        elif isinstance(module, MLP):
            init.normal_(module.down_proj.weight, std=std)


class MetaTokenModel(MetaTokenPreTrainedModel):
    """The decoder without its output head."""

    block_class: ClassVar[type[MetaTokenBlock]] = MetaTokenBlock

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the decoder that `config` describes."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.has_rotation:
            rotary = XposRotaryEmbedding if config.position_encoding == "xpos" else MetaTokenRotaryEmbedding
            self.rotary_emb = rotary(config=config)
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
        **kwargs: Any,
    ) -> MetaTokenModelOutput:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 1 = a token, 0 = padding on either side.
            position_ids: (B, T) int64; by default tokens are counted from 0 in each row, padding left out. They only
                place tokens: documents packed into one row see each other, as in GPT-2's training.
            past_key_values: a cache made from this model's config.
            inputs_embeds: (B, T, C) in place of `input_ids`.
            use_cache: return a cache.
            meta_token_mask: (B, T) bool, True at meta-tokens; by default `input_ids == config.meta_token_id`.
            meta_indices: (B, M) int64, the meta-tokens' indices in order, every row with M of them; spares a host
                synchronisation and makes a training step one graph. Ignored unless meta-attention is over meta-tokens.
            **kwargs: passed to the attention function.

        Raises:
            ValueError: for both or neither kind of input, a sequence longer than the model, or meta-attention over
                random tokens without their ids.
        """
        hidden, meta_token_mask = self._embed(input_ids, inputs_embeds, meta_token_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = self._place(hidden, attention_mask, position_ids, seen)
        if self.config.position_encoding == "learned":
            hidden = hidden + self.embed_positions(position_ids)
        rotary = self.rotary_emb(hidden, position_ids) if self.config.has_rotation else None
        slopes = self._alibi_slopes(hidden)
        mask = self._causal_mask(hidden, attention_mask, past_key_values, slopes)

        pack = None
        if self.has_meta_attention:
            members = choose_members(
                self.config,
                input_ids=input_ids,
                position_ids=position_ids,
                meta_token_mask=meta_token_mask,
                attention_mask=attention_mask,
                seen=seen,
            )
            pack = self._pack(
                hidden,
                meta_token_mask=members,
                meta_indices=meta_indices if self.config.meta_attention_over == "meta" else None,
                rotary=rotary,
                alibi_slopes=slopes,
                past_key_values=past_key_values,
                mask=mask,
            )
        masks = self._masks_of_layers(mask, hidden, attention_mask, past_key_values, slopes, meta_token_mask)
        hidden = self.dropout(hidden)
        for layer, layer_mask in zip(self.layers, masks, strict=True):
            hidden = layer(hidden, rotary, layer_mask, pack, past_key_values, **kwargs)
        return MetaTokenModelOutput(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, meta_token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if meta_token_mask is None:
            if input_ids is None or self.config.meta_token_id is None:
                meta_token_mask = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            else:
                meta_token_mask = input_ids == self.config.meta_token_id
        return hidden, meta_token_mask.bool()

    def _place(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, seen: int | Tensor
    ) -> Tensor:
        """Return the positions (B or 1, T), after checking that the sequence fits the model."""
        num_tokens = hidden.shape[1]
        if isinstance(seen, int):  # a static cache counts on the device; `prepare_inputs_for_generation` checks then
            self.config.check_length(seen + num_tokens)
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        return (torch.arange(num_tokens, device=hidden.device) + seen)[None]

    def _alibi_slopes(self, hidden: Tensor) -> Tensor | None:
        if self.config.position_encoding != "alibi":
            return None
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f'position_encoding "alibi" needs attn_implementation "eager" or "sdpa", not '
                f'"{self.config._attn_implementation}"'
            )
        return torch.tensor(alibi_slopes(self.config.num_attention_heads), dtype=hidden.dtype, device=hidden.device)

    def _masks_of_layers(
        self,
        mask: Any,
        hidden: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        slopes: Tensor | None,
        meta_token_mask: Tensor,
    ) -> Sequence[Any]:
        """Return the mask of each block's self-attention; a subclass may narrow the causal one."""
        del hidden, attention_mask, past_key_values, slopes, meta_token_mask
        return [mask] * len(self.layers)

    def _causal_mask(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        slopes: Tensor | None,
        pattern: MaskFunction | None = None,
    ) -> Any:
        """Return the mask, in the backend's format, of what is causal, no padding and in the pattern."""
        # position_ids stay out of this call: transformers would take any that do not rise by one for packed documents
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=pattern,
            allow_is_causal_skip=slopes is None,
        )
        if slopes is None:
            return mask
        # between tokens of a row the distance in columns is the distance in positions, padding or not
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        columns = torch.arange(hidden.shape[1], device=hidden.device) + seen
        return add_alibi(mask, columns[None], torch.arange(mask.shape[-1], device=hidden.device)[None], slopes)

    def _pack(self, hidden: Tensor, *, mask: Any, **inputs: Any) -> MetaPack | None:
        if self.config.meta_attention_over == "all":
            past = inputs["past_key_values"]
            seen = past.get_seq_length() if past is not None else 0
            return pack_all_tokens(hidden, rotary=inputs["rotary"], mask=mask, seen=seen)
        # while training, a batch without meta-tokens still touches the meta parameters (see `always`)
        return pack_meta_tokens(self.config, hidden, always=self.training and torch.is_grad_enabled(), **inputs)


class MetaTokenForCausalLM(MetaTokenPreTrainedModel, MetaTokenGenerationMixin):
    """The language model; its generation never samples the meta-token."""

    model_class: ClassVar[type[MetaTokenModel]] = MetaTokenModel
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the model that `config` describes."""
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # saved with the model, for what generates without this class
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
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        meta_token_mask: Tensor | None = None,
        meta_indices: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MetaTokenCausalLMOutput:
        """Run the model; the arguments of `MetaTokenModel.forward`, and these.

        Args:
            labels: (B, T) int64 aligned with the inputs; -100 and meta-tokens are no targets. Collators that count
                targets must put -100 at meta-tokens themselves.
            shift_labels: (B, T) int64, what each position must predict; takes the place of `labels`.
            logits_to_keep: make the logits of the last so many positions, or of these indices; 0 means all.
            num_items_in_batch: what the summed loss is divided by; by default the number of valid targets.

        Returns:
            The loss in nats, and logits (B, T, V) unless the model is training with labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            meta_token_mask=meta_token_mask,
            meta_indices=meta_indices,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if shift_labels is None and labels is not None:
            is_meta = torch.zeros_like(labels, dtype=torch.bool) if meta_token_mask is None else meta_token_mask.bool()
            if meta_token_mask is None and input_ids is not None and self.config.meta_token_id is not None:
                is_meta = input_ids == self.config.meta_token_id
            shift_labels = targets_of_labels(labels, is_meta, self.config.loss_policy)
        if shift_labels is not None:
            loss = summed_cross_entropy(hidden, self.lm_head.weight, shift_labels)
            num_targets = (shift_labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(num_targets, device=loss.device).clamp(min=1)
        logits = None
        if shift_labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return MetaTokenCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            meta_attentions=outputs.meta_attentions,
        )
