"""Decoding in which a scheduled meta-token costs no step of its own.

Where the schedule puts a meta-token is known before it stands there, so it is read in the same forward pass as the text
token before it: two rows share one pass over the weights, which is what a step on one sequence waits for. The text is
that of `metatokens.model.schedule.generate`, which reads every token in a step of its own and can do all that
transformers' `generate` can; the sampled one too, since meta-tokens take as many random numbers here as there.

Several sequences share the passes as well. Those that get no meta-token where others do have padding in that place,
which no token sees and which has no position; a sequence that has ended leaves the batch and its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from metatokens.graft.grafting import memory_of
from metatokens.model.cache import with_room
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
    return isinstance(model, MetaTokenGenerationMixin) and states_what_is_followed(model)


def states_what_is_followed(model: Any) -> bool:
    """Tell whether a model's generation config states nothing that `decode` would not do."""
    stated = {name for name, value in model.generation_config.to_diff_dict().items() if value}
    return stated <= _FOLLOWED


class Sampler:
    """Chooses the next token from logits as transformers' `generate` does."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        suppressed: Sequence[int],
        device: Any,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take the settings of `generate_text`; a temperature of 0 always takes the likeliest token.

        Random numbers are those of `generator`, or by default of torch's own, as in `generate`.
        """
        self._is_greedy = temperature == 0
        self._generator = generator
        self._processors = LogitsProcessorList()
        self._suppressed = torch.tensor([*suppressed], dtype=torch.int64, device=device)
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
        scores = logits.to(dtype=torch.float32, copy=True)
        # as SuppressTokensLogitsProcessor, which searches the whole vocabulary for them in each step
        scores = self._processors(no_ids, scores.index_fill_(-1, self._suppressed, -torch.inf))
        if self._is_greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), num_samples=1, generator=self._generator))

    def skip(self, logits: Tensor) -> None:
        """Use up the random numbers that `generate` spends on a forced token."""
        if self._is_greedy:
            return
        if self._certain is None:
            self._certain = torch.zeros(logits.shape, device=logits.device)
            self._certain[:, 0] = 1
        torch.multinomial(self._certain, num_samples=1, generator=self._generator)


@dataclass
class Continuation:
    """One sequence that `decode_together` continues."""

    prompt_ids: Sequence[int]
    """With its meta-tokens."""
    num_new: int
    """New tokens at most, meta-tokens among them."""
    sampler: Sampler
    """Chooses text tokens."""
    emit: Callable[[int], None]
    """Called with each new token."""
    num_text: int = 0
    """Text tokens that were read before the prompt; later, all that were read or are unread."""
    num_meta: int = 0
    """Of meta-tokens likewise."""
    unread: list[int] = field(init=False)
    """Tokens that the next pass reads."""
    has_ended: bool = field(init=False, default=False)
    _num_due: int = field(init=False, default=0)

    def begin(self, meta_token_id: int | None) -> None:
        """Count the prompt."""
        self.unread = [*self.prompt_ids]
        num_meta = sum(token == meta_token_id for token in self.prompt_ids)
        self.num_meta += num_meta
        self.num_text += len(self.prompt_ids) - num_meta

    def add_meta_tokens(self, schedule: MetaSchedule, meta_token_id: int | None) -> None:
        """Let the meta-tokens that are due be read with the token before them."""
        self._num_due = 0
        while self.num_new and schedule.is_due(self.num_text, self.num_meta, self.unread[-1] == meta_token_id):
            assert meta_token_id is not None
            self.unread.append(meta_token_id)
            self.num_meta, self.num_new, self._num_due = self.num_meta + 1, self.num_new - 1, self._num_due + 1

    def go_on(self, logits: Tensor | None, eos_token_id: int) -> None:
        """Take the next text token from the logits (1, V) behind what was read; None if none is wanted."""
        for token in self.unread[len(self.unread) - self._num_due :]:
            self.emit(token)
            if logits is not None:
                self.sampler.skip(logits)
        self.has_ended = logits is None
        if logits is None:
            return
        token = self.sampler.choose(logits)
        self.emit(token)
        self.num_new -= 1
        self.has_ended = token == eos_token_id or not self.num_new
        self.unread, self.num_text = [token], self.num_text + 1


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
    wanted = Continuation(prompt_ids, num_new, sampler, emit, num_text, num_meta)
    decode_together(model, [wanted], schedule=schedule, eos_token_id=eos_token_id, cache=cache)


@torch.no_grad()
def decode_together(
    model: MetaTokenForCausalLM,
    wanted: Sequence[Continuation],
    *,
    schedule: MetaSchedule,
    eos_token_id: int,
    cache: DynamicCache | None = None,
) -> None:
    """Continue several prompts of any lengths, each as `decode` would alone; its model and other arguments.

    A cache must have a row for each of them.
    """
    meta_token_id = getattr(model.config, "meta_token_id", None)
    for one in wanted:
        one.begin(meta_token_id)
    cache = with_room(DynamicCache(config=model.config)) if cache is None else cache
    reader = _Reader(model, cache, num_rows=len(wanted), filler=eos_token_id)
    running = [*wanted]
    while running:
        for one in running:
            one.add_meta_tokens(schedule, meta_token_id)
        reading = [one for one in running if one.num_new]
        reader.keep([index for index, one in enumerate(running) if one.num_new])
        logits = reader.read([one.unread for one in reading]) if reading else ()
        for one in running:
            if not one.num_new:
                one.go_on(None, eos_token_id)
        for one, its_logits in zip(reading, logits, strict=True):
            one.go_on(its_logits[None], eos_token_id)
        reader.keep([index for index, one in enumerate(reading) if not one.has_ended])
        running = [one for one in reading if not one.has_ended]


def read_into(model: MetaTokenForCausalLM, ids: Sequence[int], cache: DynamicCache) -> Tensor:
    """Read tokens into the cache, and return the logits (1, V) after the last one."""
    return _Reader(model, cache, num_rows=1).read([ids])


class _Reader:
    """Reads the tokens of several sequences into one cache."""

    def __init__(self, model: MetaTokenForCausalLM, cache: DynamicCache, *, num_rows: int, filler: int = 0) -> None:
        self._model = model
        self._filler = filler  # an id that stands for padding; it must not be the meta-token
        self._cache = cache
        self._num_rows = num_rows
        self._num_read = int(cache.get_seq_length())
        grafted = memory_of(model)
        policy = model.config.memory_policy if grafted is None else grafted[0]
        self._at_a_time = PREFILL_POSITIONS if policy is None else max(MEMORY_PREFILL_POSITIONS, policy.window)
        self._mask: Tensor | None = None  # (B, columns), while some row has padding

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows."""
        if len(rows) == self._num_rows or not rows:
            return
        self._num_rows = len(rows)
        if not self._num_read:
            return
        index = torch.tensor(rows, device=self._model.device)
        self._cache.batch_select_indices(index)
        self._mask = None if self._mask is None else self._mask[index]

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (B, V) after the last token of each row."""
        model = self._model
        width = max(map(len, rows))
        ids = torch.tensor([[self._filler] * (width - len(row)) + [*row] for row in rows], device=model.device)
        if self._mask is not None or any(len(row) < width for row in rows):
            before = ids.new_ones(len(rows), self._num_read) if self._mask is None else self._mask
            is_token = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
            self._mask = torch.cat([before, torch.tensor(is_token, device=model.device)], dim=1)
        logits: Tensor | None = None
        for part in ids.split(self._at_a_time, dim=1):
            self._num_read += part.shape[1]
            mask = None if self._mask is None else self._mask[:, : self._num_read]
            logits = model(
                input_ids=part, attention_mask=mask, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits
        assert logits is not None
        return logits[:, -1]
