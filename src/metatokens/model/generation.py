"""What `generate` needs to know: which ids are never sampled, and how the prompt's meta-tokens reach each step."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from .compatibility import create_causal_mask, find_cache, one_cache
from .configuration import MetaTokenConfig


class MetaTokenGenerationMixin(GenerationMixin):
    """Generation that never samples the meta-token."""

    config: MetaTokenConfig

    def _ids_never_sampled(self) -> list[int]:
        # no loss is paid for predicting the meta-token, so its logit means nothing; what lies above it is padding
        first = self.config.meta_token_id
        return [] if first is None else list(range(first, self.config.vocab_size))

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Add the ids that are never sampled to the caller's own `suppress_tokens`."""
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        suppressed = {*(generation_config.suppress_tokens or ()), *self._ids_never_sampled()}
        generation_config.suppress_tokens = sorted(suppressed) or None
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        meta_token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Check the length, and cut `meta_token_mask`, which describes the prompt, to each step's tokens.

        Later meta-tokens show by their id.

        Raises:
            ValueError: for a sequence longer than the model, whatever the cache.
        """
        sequence = args[0] if args else kwargs["input_ids"]
        self.config.check_length(sequence.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1]))
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if meta_token_mask is None:
            return inputs
        past, embeds = find_cache(inputs), inputs.get("inputs_embeds")
        seen = int(past.get_seq_length()) if past is not None else 0
        num_tokens = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        missing = max(0, seen + num_tokens - meta_token_mask.shape[1])
        step_mask = nn.functional.pad(meta_token_mask, (0, missing))[:, seen : seen + num_tokens]
        if embeds is None and missing:
            later = torch.arange(seen, seen + num_tokens, device=step_mask.device) >= meta_token_mask.shape[1]
            step_mask = step_mask | (later & (inputs["input_ids"] == self.config.meta_token_id))
        inputs["meta_token_mask"] = step_mask
        return inputs

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
        """Make the mask of `generate` with a static cache; the library's own knows only its own layer types."""
        del position_ids, kwargs
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=one_cache(past_key_values, cache),
        )
