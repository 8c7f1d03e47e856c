"""Schedules of meta-tokens, and the one way in which `generate` follows them.

A model never samples its meta-token, which was no target in training. Instead a schedule says where meta-tokens stand,
as the injection does in training (paper section 3). A schedule is a pure function of the tokens before a position. So
the prompt and its continuation join without a seam, and beams, padded batches and continued sequences get the layout
that each would get alone.

This file stands alone: a checkpoint also carries it as `custom_generate/generate.py`, from which transformers takes
`generate` for models of any class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    logging,
)

logger = logging.get_logger(__name__)

_WORD = 2**64
_META_RATIO = 0.1  # the k of the paper, section 3

PLAIN_TEXT_WARNING = (
    "this model has meta-attention, and no meta-token was inserted: it generates as a plain model. Give generate a "
    'meta_schedule, or say meta_schedule={"kind": "none"} there or in the generation config if that is what you want'
)
EMBEDDINGS_WARNING = (
    "a schedule cannot count a prompt of embeddings alone, so no meta-token follows it: give generate input_ids beside "
    "inputs_embeds"
)


# Schedules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSchedule:
    """No meta-token at all."""

    kind: Literal["none"] = field(default="none", init=False)

    @property
    def is_empty(self) -> bool:
        """Tell whether no sequence, however long, gets a meta-token; this one puts none anywhere."""
        return True

    def is_due(self, num_text: int, num_meta: int, after_meta: bool) -> bool:
        """Return False."""
        del num_text, num_meta, after_meta
        return False


@dataclass(frozen=True)
class PeriodicSchedule:
    """One meta-token after every `text_tokens` text tokens; prompt and continuation count as one sequence."""

    text_tokens: int = 9
    """Text tokens between meta-tokens, at least 1; 9 is the ratio 0.1."""
    kind: Literal["periodic"] = field(default="periodic", init=False)

    def __post_init__(self) -> None:
        """Check the period."""
        if not isinstance(self.text_tokens, int) or self.text_tokens < 1:
            raise ValueError(f"text_tokens must be an integer of at least 1, not {self.text_tokens!r}")

    @property
    def is_empty(self) -> bool:
        """Tell whether no sequence, however long, gets a meta-token."""
        return False

    def is_due(self, num_text: int, num_meta: int, after_meta: bool) -> bool:
        """Return True once after each multiple of `text_tokens`."""
        del num_meta
        return num_text > 0 and num_text % self.text_tokens == 0 and not after_meta


@dataclass(frozen=True)
class ThoughtSchedule:
    """A run of `num_tokens` meta-tokens after every `text_tokens` text tokens."""

    text_tokens: int = 90
    """Text tokens between runs, at least 1."""
    num_tokens: int = 10
    """Meta-tokens of a run, at least 1."""
    kind: Literal["thought"] = field(default="thought", init=False)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("text_tokens", "num_tokens"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {number!r}")

    @property
    def is_empty(self) -> bool:
        """Tell whether no sequence, however long, gets a meta-token."""
        return False

    def is_due(self, num_text: int, num_meta: int, after_meta: bool) -> bool:
        """Return True after each multiple of `text_tokens`, until the number of meta-tokens is one of `num_tokens`."""
        is_place = num_text > 0 and num_text % self.text_tokens == 0
        return is_place and (not after_meta or num_meta % self.num_tokens > 0)


@dataclass(frozen=True)
class UniformSchedule:
    """A meta-token at each position with the same probability, drawn for each position on its own."""

    ratio: float = _META_RATIO
    """k: the probability that a position holds a meta-token, from 0 to below 1."""
    seed: int = 0
    """Seed of the draws, which also depend on the position; from 0 to below 2^63."""
    kind: Literal["uniform"] = field(default="uniform", init=False)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must lie in 0 <= ratio < 1, not {self.ratio!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to below 2^63, not {self.seed!r}")

    @property
    def is_empty(self) -> bool:
        """Tell whether the ratio is 0."""
        return self.ratio == 0

    def is_due(self, num_text: int, num_meta: int, after_meta: bool) -> bool:
        """Return True where the hash of (seed, position) is below the ratio."""
        del after_meta
        # the upper 53 bits as a number in [0, 1)
        return (_hash(self.seed, num_text + num_meta) >> 11) * 2.0**-53 < self.ratio


MetaSchedule = NoSchedule | PeriodicSchedule | ThoughtSchedule | UniformSchedule
"""`is_due(num_text, num_meta, after_meta)` tells whether a meta-token comes next after these counts of tokens."""

_KINDS: dict[str, type[NoSchedule] | type[PeriodicSchedule] | type[ThoughtSchedule] | type[UniformSchedule]] = {
    schedule.kind: schedule for schedule in (NoSchedule, PeriodicSchedule, ThoughtSchedule, UniformSchedule)
}


def read_schedule(value: Any) -> MetaSchedule | None:
    """Return the schedule that a generation config or a caller states: a schedule, a mapping, a kind, or None.

    Raises:
        ValueError: for anything else, an unknown kind or field, or a number out of range.
    """
    if value is None or hasattr(value, "is_due"):
        schedule: MetaSchedule | None = value
        return schedule
    fields = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        expected = f"a schedule, a mapping with a kind, or one of the kinds {', '.join(_KINDS)}"
        raise ValueError(f"meta_schedule must be {expected}, not {value!r}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"meta_schedule {value!r}: {error}") from None


def state_schedule(generation_config: GenerationConfig, schedule: MetaSchedule | None) -> None:
    """Write a schedule into a generation config, with which it is saved and from which `generate` takes it."""
    generation_config.meta_schedule = None if schedule is None else asdict(schedule)
    # transformers drops every name of others from a generation config that is marked as made from a model's config
    generation_config._from_model_config = False


def schedule_meta_tokens(
    text_ids: Sequence[int],
    schedule: MetaSchedule,
    *,
    meta_token_id: int,
    num_text: int = 0,
    num_meta: int = 0,
    after_meta: bool = False,
) -> list[int]:
    """Return a prompt with its scheduled meta-tokens; generation adds one that is due after the last text token.

    Args:
        text_ids: The prompt.
        schedule: Where meta-tokens go.
        meta_token_id: The id to put there.
        num_text: Text tokens before the prompt.
        num_meta: Meta-tokens before the prompt.
        after_meta: Whether the last token before the prompt is a meta-token.
    """
    result: list[int] = []
    for num_before, token in enumerate(text_ids, start=num_text):
        while schedule.is_due(num_before, num_meta, result[-1] == meta_token_id if result else after_meta):
            result.append(meta_token_id)
            num_meta += 1
        result.append(token)
    return result


def _hash(seed: int, position: int) -> int:
    """Return a 64-bit hash: `metatokens.data.keyed_random.hash_key`, which does not travel with a checkpoint."""
    key = 0
    for word in (seed, position):
        key = ((key ^ word) + 0x9E3779B97F4A7C15) % _WORD
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % _WORD
        key = (key ^ key >> 27) * 0x94D049BB133111EB % _WORD
        key ^= key >> 31
    return key


class MetaTokenSchedule(LogitsProcessor):
    """Forces the meta-token where the schedule has one, and forbids it elsewhere.

    `generate` makes one for its `meta_schedule`. Given as a `logits_processor` it takes the place of that schedule:

        model.generate(**inputs, logits_processor=LogitsProcessorList([MetaTokenSchedule(...)]))

    It runs after the processors that `generate` makes itself, so the meta-token is forced even if `suppress_tokens`
    holds it, as that of our models does. Its score is then 0, so it costs a beam nothing. Meta-tokens count as new
    tokens in `max_new_tokens`. A prompt should come with its meta-tokens (`schedule_meta_tokens`), since none are added
    to it here. Beside `inputs_embeds`, give `generate` the prompt's `input_ids` too, or the schedule cannot count it.
    Beam search that samples needs more than one candidate a beam and does not work with a forced token.
    """

    def __init__(
        self,
        schedule: MetaSchedule,
        *,
        meta_token_id: int,
        pad_token_id: int | None = None,
        num_padding: Tensor | None = None,
    ) -> None:
        """Take the schedule and the ids.

        Args:
            schedule: Where meta-tokens go.
            meta_token_id: The id to force.
            pad_token_id: Not counted, wherever it stands; it must not be a text token.
            num_padding: (B,) columns of each prompt that hold no token, in place of `pad_token_id`.
        """
        self.schedule = schedule
        self.meta_token_id = meta_token_id
        self.pad_token_id = pad_token_id
        self.num_padding = num_padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return new scores (B, V) for the token after `input_ids` (B, T).

        Raises:
            ValueError: for a prompt of embeddings without its ids.
        """
        num_rows, num_tokens = input_ids.shape
        if not num_tokens:
            raise ValueError(
                "the prompt has no ids, so a schedule cannot count it: give generate input_ids beside inputs_embeds"
            )
        is_meta = input_ids == self.meta_token_id
        if self.num_padding is not None:
            # beams and several sequences of a prompt stand side by side
            num_padding = self.num_padding.repeat_interleave(num_rows // len(self.num_padding))
        else:
            num_padding = (input_ids == (-1 if self.pad_token_id is None else self.pad_token_id)).sum(1)
        counts = torch.stack([num_tokens - num_padding.to(input_ids.device) - is_meta.sum(1), is_meta.sum(1)], 1)
        due = [
            self.schedule.is_due(num_text, num_meta, after_meta)
            for (num_text, num_meta), after_meta in zip(counts.tolist(), is_meta[:, -1].tolist(), strict=True)
        ]
        is_due = torch.tensor(due, device=scores.device)[:, None]
        is_meta_column = torch.arange(scores.shape[1], device=scores.device) == self.meta_token_id
        return scores.masked_fill(is_meta_column ^ is_due, -torch.inf).masked_fill(is_meta_column & is_due, 0.0)


# Generation --------------------------------------------------------------------------------------------------


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *arguments: Any,
    model: Any,
    meta_schedule: Any = None,
    **options: Any,
) -> Any:
    """Generate as transformers does, with meta-tokens in the prompt and the continuation by the model's schedule.

    The schedule is `meta_schedule`, or that of the given generation config, or that of the model's: a schedule or a
    mapping such as `{"kind": "periodic", "text_tokens": 9}`. A row of the prompt that holds meta-tokens already stays
    as it is, and so does every prompt of embeddings, with positions of its own or after a filled cache.

    As always, the sequences begin with the prompt as it was given: the meta-tokens put into it are seen by the model
    and left out again, those of the continuation stay. A cache that is returned holds both. `max_new_tokens` counts
    meta-tokens too, `max_length` all but those put into the prompt.

    A model with meta-attention that gets no meta-token at all warns once, unless the schedule is `none`.

    Args:
        inputs: (B, T) int64, as `input_ids`.
        generation_config: as in transformers; may hold `meta_schedule`.
        logits_processor: as in transformers; a `MetaTokenSchedule` in it takes the place of the schedule.
        stopping_criteria: as in transformers; beside a schedule they see the sequences that are returned, each row's
            new meta-tokens moved before its new text, and stop nothing at a meta-token.
        *arguments: as in transformers.
        model: any causal language model of transformers; a schedule needs `config.meta_token_id`. By name, as
            transformers gives it to a `generate` that comes with a checkpoint.
        meta_schedule: where meta-tokens go.
        **options: as in transformers.

    Raises:
        ValueError: for a schedule that `read_schedule` refuses, or that the model has no meta-token for.
    """
    stated = _Settings(model, generation_config, options | {"meta_schedule": meta_schedule})
    schedule = read_schedule(stated["meta_schedule"])
    meta_token_id = getattr(model.config, "meta_token_id", None)
    ids = inputs if inputs is not None else options.get("input_ids")
    processors = LogitsProcessorList(logits_processor or ())
    has_own = any(isinstance(processor, MetaTokenSchedule) for processor in processors)
    prompt = None
    if schedule is not None and not schedule.is_empty and not has_own:
        if meta_token_id is None:
            raise ValueError(
                f"meta_schedule {schedule.kind} needs a model with a meta-token, and meta_token_id is None"
            )
        if ids is None:
            logger.warning_once(EMBEDDINGS_WARNING)
        else:
            prompt = _Prompt(ids, stated, options, schedule, meta_token_id)
            options = prompt.options(options, stated)
            inputs = prompt.ids if inputs is not None else None
            stopping_criteria = prompt.in_the_text(stopping_criteria, meta_token_id)
            processors.append(MetaTokenSchedule(schedule, meta_token_id=meta_token_id, num_padding=prompt.num_padding))
    elif schedule is None and not has_own and _sees_plain_text(model.config, ids, options):
        logger.warning_once(PLAIN_TEXT_WARNING)
    output = GenerationMixin.generate(
        model, inputs, generation_config, processors, stopping_criteria, *arguments, **options
    )
    return output if prompt is None else prompt.restore(output)


class _Settings:
    """What a call of `generate` states: its own options first, then its generation config, then the model's."""

    def __init__(self, model: Any, generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
        self._sources = (options, vars(generation_config or object), vars(model.generation_config))

    def __getitem__(self, name: str) -> Any:
        return next((source[name] for source in self._sources if source.get(name) is not None), None)


class _Prompt:
    """A prompt with its scheduled meta-tokens.

    Attributes:
        ids: (B, T) int64, padded on the left if the rows have different lengths.
        num_padding: (B,) int64, columns without a token.
    """

    def __init__(
        self, given: Tensor, stated: _Settings, options: dict[str, Any], schedule: MetaSchedule, meta_token_id: int
    ) -> None:
        self._given = self.ids = given
        pad_token_id = stated["pad_token_id"]
        mask = options.get("attention_mask")
        if mask is None:  # as transformers infers it
            is_padding = pad_token_id is not None and pad_token_id not in _as_list(stated["eos_token_id"])
            mask = given != pad_token_id if is_padding else torch.ones_like(given)
        self._mask = mask
        if not _is_laid_out(options) and mask.shape == given.shape:
            rows = [
                row[kept].tolist()
                if (row[kept] == meta_token_id).any()
                else schedule_meta_tokens(row[kept].tolist(), schedule, meta_token_id=meta_token_id)
                for row, kept in zip(given, mask.bool(), strict=True)
            ]
            if any(len(row) != num for row, num in zip(rows, mask.bool().sum(1).tolist(), strict=True)):
                self._pad_left(rows, filler=pad_token_id or 0)
        self.num_padding = (self._mask == 0).sum(1)

    def _pad_left(self, rows: list[list[int]], filler: int) -> None:
        longest = max(map(len, rows))
        new: dict[str, Any] = {"device": self._given.device, "dtype": self._given.dtype}
        self.ids = torch.tensor([[filler] * (longest - len(row)) + row for row in rows], **new)
        self._mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], **new)

    def options(self, options: dict[str, Any], stated: _Settings) -> dict[str, Any]:
        """Return the options of `generate` that fit this prompt in place of the one that was given."""
        if self.ids is self._given:
            return options
        changed = options | {"attention_mask": self._mask}
        if "input_ids" in options:
            changed["input_ids"] = self.ids
        # these count the prompt
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if stated[total] and stated[new] is None:
                changed[total] = stated[total] + self.ids.shape[1] - self._given.shape[1]
        return changed

    def in_the_text(self, criteria: StoppingCriteriaList | None, meta_token_id: int) -> StoppingCriteriaList | None:
        """Let criteria read the text without interruption."""
        if criteria is None:
            return None
        return StoppingCriteriaList(_InTheText(criterion, self, meta_token_id) for criterion in criteria)

    def restore(self, output: Any) -> Any:
        """Put the prompt as it was given at the beginning of the sequences (B', T')."""
        if isinstance(output, Tensor):
            return torch.cat(self.split(output), dim=1)
        output.sequences = torch.cat(self.split(output.sequences), dim=1)
        return output

    def split(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompt as it was given, and what follows it; each has B' rows."""
        given = self._given.repeat_interleave(len(sequences) // len(self._given), dim=0)
        return given.to(sequences.device), sequences[:, self.ids.shape[1] :]


class _InTheText(StoppingCriteria):
    """A criterion that reads the text without interruption, after the prompt as it was given."""

    def __init__(self, criterion: StoppingCriteria, prompt: _Prompt, meta_token_id: int) -> None:
        self._criterion = criterion
        self._prompt = prompt
        self._meta_token_id = meta_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        given, new = self._prompt.split(input_ids)
        is_text = new != self._meta_token_id
        text = new.gather(1, is_text.long().argsort(dim=1, stable=True))
        stops: Tensor = self._criterion(torch.cat([given, text], dim=1), scores, **options)
        # a meta-token adds no text: right after it, what ends the prompt must not stop the row
        return stops & is_text[:, -1]


def _is_laid_out(options: dict[str, Any]) -> bool:
    """Tell whether the caller has given more than a prompt of ids, whose columns must then stay where they are."""
    caches = (options.get(name) for name in ("past_key_values", "cache"))
    return any(cache is not None and cache.get_seq_length() for cache in caches) or any(
        options.get(name) is not None for name in ("inputs_embeds", "position_ids", "meta_token_mask", "meta_indices")
    )


def _sees_plain_text(config: Any, ids: Tensor | None, options: dict[str, Any]) -> bool:
    """Tell whether a meta-attention that needs meta-tokens finds none in the prompt; embeddings alone do not tell."""
    if not getattr(config, "takes_meta_tokens", False):
        return False
    if not any(config.has_meta_attention(layer) for layer in range(config.num_hidden_layers)):
        return False
    if config.meta_token_id is None or ids is None or _is_laid_out(options):
        return False
    return not bool((ids == config.meta_token_id).any())


def _as_list(ids: int | list[int] | None) -> list[int | None]:
    return [*ids] if isinstance(ids, list) else [ids]
