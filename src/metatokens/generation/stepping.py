"""Decoding of one sequence in which a scheduled meta-token costs no step of its own.

Where the schedule puts a meta-token is known before it stands there, so it is read in the same forward pass as the text
token before it: two rows share one pass over the weights, which is what a step on one sequence waits for. The text is
that of `metatokens.model.schedule.generate`, which reads every token in a step of its own and can do all that
transformers' `generate` can; the sampled one too, since meta-tokens take as many random numbers here as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from metatokens.model.generation import MetaTokenGenerationMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metatokens.model import MetaTokenForCausalLM
    from metatokens.model.schedule import MetaSchedule

PREFILL_POSITIONS = 2048
"""Positions of a prompt that one forward pass reads, so that its activations stay small beside the cache."""
MEMORY_PREFILL_POSITIONS = 512
"""The same in memory mode, whose cache is smaller; a window that is longer than this is read at once."""
# settings of a generation config that the caller of `decode` gives, or that do not change which token comes next
_FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "meta_schedule", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache", "_from_model_config"),
}


def follows_steps(model: Any) -> bool:
    """Tell whether `decode` does all that `generate` would do by the model's own generation config."""
    if not isinstance(model, MetaTokenGenerationMixin):
        return False
    stated = {name for name, value in model.generation_config.to_diff_dict().items() if value}
    return stated <= _FOLLOWED


class Sampler:
    """Chooses the next token from logits as transformers' `generate` does."""

    def __init__(
        self, *, temperature: float, top_k: int | None, top_p: float | None, suppressed: Sequence[int], device: Any
    ) -> None:
        """Take the settings of `generate_text`; a temperature of 0 always takes the likeliest token."""
        self._is_greedy = temperature == 0
        self._processors = LogitsProcessorList()
        if suppressed:
            self._processors.append(SuppressTokensLogitsProcessor([*suppressed], device=device))
        if temperature not in {0, 1}:
            self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None and not self._is_greedy:
            self._processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1 and not self._is_greedy:
            self._processors.append(TopPLogitsWarper(top_p))
        self._certain: Tensor | None = None

    def choose(self, logits: Tensor) -> int:
        """Return a token, from logits (1, V)."""
        no_ids = torch.empty(1, 0, dtype=torch.int64, device=logits.device)
        scores = self._processors(no_ids, logits.to(dtype=torch.float32, copy=True))
        if self._is_greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), num_samples=1))

    def skip(self, logits: Tensor) -> None:
        """Use up the random numbers that `generate` spends on a forced token."""
        if self._is_greedy:
            return
        if self._certain is None:
            self._certain = torch.zeros(logits.shape, device=logits.device)
            self._certain[:, 0] = 1
        torch.multinomial(self._certain, num_samples=1)


@torch.no_grad()
def decode(
    model: MetaTokenForCausalLM,
    prompt_ids: Sequence[int],
    *,
    schedule: MetaSchedule,
    num_new: int,
    eos_token_id: int,
    sampler: Sampler,
    emit: Callable[[int], None],
    cache: DynamicCache | None = None,
    num_text: int = 0,
    num_meta: int = 0,
) -> None:
    """Continue a prompt until the end of text or the last new token.

    Args:
        model: in evaluation mode.
        prompt_ids: with its meta-tokens.
        schedule: where meta-tokens go.
        num_new: new tokens at most, meta-tokens among them.
        eos_token_id: ends the text.
        sampler: chooses text tokens.
        emit: called with each new token.
        cache: of what was read before the prompt; it is filled further.
        num_text: text tokens in that cache.
        num_meta: meta-tokens in it.
    """
    meta_token_id = model.config.meta_token_id
    num_in_prompt = sum(token == meta_token_id for token in prompt_ids)
    num_text, num_meta = num_text + len(prompt_ids) - num_in_prompt, num_meta + num_in_prompt
    cache = DynamicCache(config=model.config) if cache is None else cache
    unread = [*prompt_ids]
    while True:
        logits: Tensor | None = None
        num_due = 0
        while num_new and schedule.is_due(num_text, num_meta, unread[-1] == meta_token_id):
            assert meta_token_id is not None
            unread.append(meta_token_id)
            num_meta, num_new, num_due = num_meta + 1, num_new - 1, num_due + 1
        if num_new:
            logits = read_into(model, unread, cache)
        for _ in range(num_due):
            assert meta_token_id is not None
            emit(meta_token_id)
            if logits is not None:
                sampler.skip(logits)
        if logits is None:
            return
        token = sampler.choose(logits)
        emit(token)
        num_new -= 1
        if token == eos_token_id or not num_new:
            return
        unread, num_text = [token], num_text + 1


def read_into(model: MetaTokenForCausalLM, ids: Sequence[int], cache: DynamicCache) -> Tensor:
    """Read tokens into the cache, and return the logits (1, V) after the last one."""
    policy = model.config.memory_policy
    step = PREFILL_POSITIONS if policy is None else max(MEMORY_PREFILL_POSITIONS, policy.window)
    logits: Tensor | None = None
    for start in range(0, len(ids), step):
        part = torch.tensor([ids[start : start + step]], device=model.device)
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits is not None
    return logits[:, -1]
