"""What `generate` needs to know: which ids are never sampled, how long a text may be, and which inputs a step sees."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .compatibility import create_causal_mask, find_cache, one_cache
from .configuration import MetaTokenConfig
from .schedule import generate

# columns that a collator adds for the loss; `generate` computes none
_LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")


class MetaTokenGenerationMixin(GenerationMixin):
    """Generation that puts meta-tokens where the schedule says, and never samples one."""

    config: MetaTokenConfig
    generation_config: GenerationConfig
    _fewest_padding: int = 0
    """Padding of the row with the least of it, of the prompts at hand: it takes columns and no positions."""

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Generate as transformers does, with meta-tokens by the model's schedule; see `schedule.generate`."""
        return generate(*arguments, model=self, **options)

    def _ids_never_sampled(self) -> list[int]:
        # the meta-token is never a target, so its logit means nothing. Rows that pad the vocabulary may be sampled: a
        # user may have added tokens that own some, and training has made the rest unlikely, since each was in every
        # softmax and never a target
        meta, padding = self.config.meta_token_id, self.config.pad_token_id
        if padding in _as_list(self.config.eos_token_id):
            padding = None
        return sorted(token for token in (meta, padding) if token is not None)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Add the ids that are never sampled to the caller's `suppress_tokens`, and drop arguments that go stale.

        `meta_indices` describe the prompt alone. Each step finds its meta-tokens by their ids instead, or for a prompt
        of `inputs_embeds` by the `meta_token_mask` that the indices become.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        padding_mask = model_kwargs.get("attention_mask")
        self._fewest_padding = 0
        if padding_mask is not None and padding_mask.ndim == 2:
            self._fewest_padding = int((padding_mask == 0).sum(-1).min())
        suppressed = {*(generation_config.suppress_tokens or ()), *self._ids_never_sampled()}
        if self.config.pad_token_id in _as_list(generation_config.eos_token_id):
            suppressed.discard(self.config.pad_token_id)
        generation_config.suppress_tokens = sorted(suppressed) or None
        for name in _LOSS_INPUTS:
            model_kwargs.pop(name, None)
        meta_indices, embeds = model_kwargs.pop("meta_indices", None), model_kwargs.get("inputs_embeds")
        if meta_indices is not None and embeds is not None and model_kwargs.get("meta_token_mask") is None:
            mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            model_kwargs["meta_token_mask"] = mask.scatter(1, meta_indices.to(embeds.device), True)
        return generation_config, model_kwargs

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:
        """Check the lengths against the model's window before the first token is made.

        Asking for more tokens than fit is no error, because the text may end earlier: generation warns and stops at the
        window. The last new token is never read, so it may stand one position past the window.

        Raises:
            ValueError: for a prompt longer than the model, or a minimum that cannot fit.
        """
        generation_config = super()._prepare_generated_length(*args, **kwargs)
        # lengths count the ids alone: positions of `inputs_embeds` may be more, and those of a padded batch are fewer
        uncounted = kwargs["inputs_tensor"].shape[1] - kwargs["input_ids_length"] - self._fewest_padding
        self.config.check_length(kwargs["input_ids_length"] + uncounted)
        self.config.check_length((generation_config.min_length or 0) + uncounted - 1)
        longest = self.config.max_sequence_length + 1 - uncounted
        if generation_config.max_length > longest:
            wanted, fitting = (
                length - kwargs["input_ids_length"] for length in (generation_config.max_length, longest)
            )
            warnings.warn(
                f"generation stops after {fitting} of at most {wanted} new tokens, at the end of the model's "
                f"{self.config.max_sequence_length} positions (max_position_embeddings)",
                stacklevel=4,
            )
            generation_config.max_length = longest
        return generation_config

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Find stop strings even where meta-tokens interrupt them."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        meta_token_id = self.config.meta_token_id
        if meta_token_id is None:
            return criteria
        return StoppingCriteriaList(
            _InTheText(criterion, meta_token_id) if isinstance(criterion, StopStringCriteria) else criterion
            for criterion in criteria
        )

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        meta_token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut `meta_token_mask`, which describes the prompt, to each step's tokens.

        Meta-tokens after the prompt are found by their id.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        policy = self.config.memory_policy
        if policy is not None and policy.positions == "text":
            inputs.pop("position_ids", None)  # transformers' count the meta-tokens too; the model's own do not
        if meta_token_mask is None:
            return inputs
        past, embeds = find_cache(inputs), inputs.get("inputs_embeds")
        seen = int(past.get_seq_length()) if past is not None else 0
        num_tokens = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        missing = max(0, seen + num_tokens - meta_token_mask.shape[1])
        step_mask = nn.functional.pad(meta_token_mask.bool(), (0, missing))[:, seen : seen + num_tokens]
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
        """Make the mask of `generate` with a static cache; transformers' own knows only its own layer types."""
        del position_ids, kwargs
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=one_cache(past_key_values, cache),
        )


def _as_list(ids: int | list[int] | None) -> list[int | None]:
    return [*ids] if isinstance(ids, list) else [ids]


class _InTheText(StoppingCriteria):
    """A criterion that reads the text without interruption: meta-tokens are moved to the front of their rows."""

    def __init__(self, criterion: StoppingCriteria, meta_token_id: int) -> None:
        self.criterion = criterion
        self.meta_token_id = meta_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        is_text = input_ids != self.meta_token_id
        text = input_ids.gather(1, is_text.long().argsort(dim=1, stable=True))
        stops: Tensor = self.criterion(text, scores, **kwargs)
        # a meta-token adds no text: right after it, a stop string that ends the prompt must not stop the row
        return stops & is_text[:, -1]
