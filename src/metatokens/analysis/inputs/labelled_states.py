"""States around the last meta-token of many instances of a task, and labels for them: what heads are fitted to.

The states after the last block, but for the second:

    last meta-token            the last before the last answer
    the same, halfway          after half of the blocks
    ordinary token instead     at its place, when a full stop stands there in place of every meta-token
    token before it            the nearest text token in front of it: the same prefix but for meta-tokens
    last token                 the one that the answer is predicted from
    untrained                  the last meta-token in a model of the same shape with its first weights
    mean embedding             no state at all: the mean embedding of the text tokens before the last meta-token

The labels: the first token of the last answer, the text tokens 1, 4 and 16 back from the last meta-token, and the
number of meta-tokens before it. The comparison with equal prefix is the fair one: the last token is trained to give the
answer and has read more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.config.analysis import FittedState, TaskSubject
from metatokens.data.injection import IntArray
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.recall import make_test_instances
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import mean_of_last
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.encoding import EncodedInstance, pad

ANSWER = "answer"
META_STATE: FittedState = "last meta-token"
BATCH_SIZE = 64
_DISTANCES = (1, 4, 16)
_FULL_STOP = " ."

States = npt.NDArray[np.float32]


class Sample(NamedTuple):
    """One instance, and the positions of its states."""

    row: EncodedInstance
    last_meta: int
    before: int
    """The nearest text token in front of the last meta-token."""
    last: int
    """The token that the answer is predicted from."""

    @property
    def label(self) -> int:
        """The first token of the last answer."""
        return int(self.row.input_ids[self.last + 1])


@dataclass(frozen=True)
class Samples:
    """States and labels of n instances."""

    states: Mapping[str, States]
    """(n, C) by name."""
    labels: Mapping[str, IntArray]
    """(n,) by target; -1 where an instance has none."""


@shared
def samples_of(inputs: Inputs) -> list[Sample]:
    """Return the further instances of the analysed task that heads and probes are fitted to; see `draw_samples`."""
    return draw_samples(inputs.lens, inputs.encoder, inputs.task, seed=inputs.config.seed)


@shared
def states_of(inputs: Inputs) -> Samples:
    """Return the states and labels of these instances."""
    states, seed = inputs.config.states, inputs.config.seed
    return collect_samples(inputs.lens, inputs.encoder, samples_of(inputs), states=states, seed=seed)


def draw_samples(lens: Lens, encoder: TextEncoder, subject: TaskSubject, *, seed: int) -> list[Sample]:
    """Return instances of the test split that have a text token before their last meta-token, and one behind it.

    Where a meta-token is what the answer is predicted from, it is trained to give it, and there is nothing to compare.

    Raises:
        UsageError: there is none.
    """
    meta_token_id = int(lens.model.config.meta_token_id)
    instances = make_test_instances(
        subject.task,
        subject.difficulty,
        encoder=PieceEncoder(encoder),
        meta_token_id=meta_token_id,
        seed=seed + 1,  # others than those that are shown
        instances=subject.fitted_instances,
    )
    samples = [sample for row in instances if (sample := sample_of(row, meta_token_id)) is not None]
    if not samples:
        raise UsageError(
            "states of meta-tokens",
            expected="a text token and a meta-token before the answer",
            found=f"none in {len(instances)} instances",
            remedy="choose a task that places meta-tokens",
        )
    return samples


def collect_samples(
    lens: Lens, encoder: TextEncoder, samples: Sequence[Sample], *, states: Sequence[FittedState], seed: int
) -> Samples:
    """Run the samples and return their states and labels.

    Args:
        lens: on the model.
        encoder: of its tokenizer, for the full stop.
        samples: of `draw_samples`.
        states: which.
        seed: of the untrained model's weights.
    """
    full_stop = int(encoder.encode_batch([_FULL_STOP])[0][-1])
    untrained = _untrained(lens.model, seed) if "untrained" in states else None
    parts: dict[FittedState, list[States]] = {state: [] for state in states}
    for start in range(0, len(samples), BATCH_SIZE):
        found = _states_of(lens, samples[start : start + BATCH_SIZE], untrained, full_stop)
        for state, part in parts.items():
            part.append(found[state].float().numpy(force=True))
    meta_token_id = int(lens.model.config.meta_token_id)
    return Samples({name: np.concatenate(part) for name, part in parts.items()}, _labels(samples, meta_token_id))


def padded_prompts(lens: Lens, samples: Sequence[Sample]) -> torch.Tensor:
    """Return the rows up to their last answers as one batch (B, T), padded on the right, which nothing reads."""
    config = lens.model.config
    rows = [sample.row for sample in samples]
    padded = pad(rows, meta_token_id=config.meta_token_id, pad_token_id=config.pad_token_id).input_ids
    prompts = padded[:, : max(sample.last for sample in samples) + 1]
    return torch.from_numpy(prompts).to(lens.model.device)


def sample_of(row: EncodedInstance, meta_token_id: int) -> Sample | None:
    """Return the positions of an instance; None where it has no meta-token behind a text token and before another."""
    answer = row.answer_spans[-1][0]
    is_meta = row.input_ids[:answer] == meta_token_id
    metas = np.flatnonzero(is_meta)
    if not len(metas) or metas[-1] == answer - 1:
        return None
    before = np.flatnonzero(~is_meta[: metas[-1]])
    return Sample(row, int(metas[-1]), int(before[-1]), answer - 1) if len(before) else None


def _states_of(
    lens: Lens, samples: Sequence[Sample], untrained: Lens | None, full_stop: int
) -> dict[FittedState, torch.Tensor]:
    """Return every state of a batch, (B, C) each; "untrained" where there is such a model."""
    num_layers = len(lens.layout.blocks)
    ids = padded_prompts(lens, samples)
    is_meta = lens.is_meta(ids)
    row = torch.arange(len(samples))
    last_meta, before, last = (
        torch.tensor([getattr(sample, place) for sample in samples]) for place in ("last_meta", "before", "last")
    )
    middle, final = (f"blocks.{layer}.hook_resid_post" for layer in ((num_layers - 1) // 2, num_layers - 1))
    embeddings = lens.model.get_input_embeddings()(ids).detach()
    columns = torch.arange(ids.shape[1], device=ids.device)
    means, _ = mean_of_last(embeddings, ~is_meta & (columns < last_meta[:, None].to(ids.device)), ids.shape[1])
    found: dict[FittedState, torch.Tensor] = {"mean embedding": means[row, last_meta]}
    with lens.capture([middle, final]) as captured:
        lens.run(ids)
    found["last meta-token"] = captured[final][row, last_meta]
    found["last meta-token, halfway"] = captured[middle][row, last_meta]
    found["token before it"] = captured[final][row, before]
    found["last token"] = captured[final][row, last]
    with lens.capture([final]) as captured:
        lens.run(torch.where(is_meta, full_stop, ids))
    found["ordinary token instead"] = captured[final][row, last_meta]
    if untrained is not None:
        with untrained.capture([final]) as captured:
            untrained.run(ids)
        found["untrained"] = captured[final][row, last_meta]
    return found


def _labels(samples: Sequence[Sample], meta_token_id: int) -> dict[str, IntArray]:
    prefixes = [sample.row.input_ids[: sample.last_meta] for sample in samples]
    texts = [prefix[prefix != meta_token_id] for prefix in prefixes]
    labels: dict[str, list[int]] = {ANSWER: [sample.label for sample in samples]}
    for distance in _DISTANCES:
        name = "the token before" if distance == 1 else f"the token {distance} back"
        labels[name] = [text[-distance] if len(text) >= distance else -1 for text in texts]
    labels["meta-tokens so far"] = [len(prefix) - len(text) for prefix, text in zip(prefixes, texts, strict=True)]
    return {name: np.array(values, dtype=np.int64) for name, values in labels.items()}


def _untrained(model: Any, seed: int) -> Lens:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(model)(model.config)
    return Lens(untrained.to(model.device).eval())
