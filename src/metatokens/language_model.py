"""A language model and its tokenizer as one object: what most people want of a trained model, a line each.

    import metatokens as mt

    lm = mt.load("demo/meta")
    print(lm.generate("Once upon a time", every=9).text)
    with lm.intervene(mt.ZeroEmbedding()):
        print(lm.perplexity(["A text.", "Another text."]).perplexity)

Each method calls the function of the package that does the work; nothing is computed here. A text is a string, which
gets its meta-tokens as the model's training put them, or ids, which are taken as they are. Methods run the model on the
device where it is, in evaluation mode, and leave its mode as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import weights_of_both_branches
from metatokens.config.finetuning import EvaluateConfig
from metatokens.config.schema import Injection, ModelConfig, NoInjection, UniformInjection
from metatokens.config.tasks import LENGTH_BINS, Task
from metatokens.data.injection import inject_into_prompt
from metatokens.data.sources import iterate_documents
from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer, build_hf_tokenizer, ends_clause_table
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import Intervention, intervene, parse_intervention
from metatokens.evaluation.perplexity import PerplexityResult, measure_perplexity
from metatokens.evaluation.recall import RecallRow, evaluate_recall
from metatokens.evaluation.windows import PerplexityOptions
from metatokens.generation.compressed import CompressedDocument, compress_document
from metatokens.generation.decoding import (
    GeneratedText,
    MetaSchedule,
    PeriodicSchedule,
    evaluating,
    generate_text,
    read_schedule,
    schedule_for,
    sequence_limit,
)
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.lens import Lens
from metatokens.model.export import save_model
from metatokens.model.schedule import state_schedule
from metatokens.report.attention_figure import Attention
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.registry import find_task
from metatokens.training.checkpoint import MANIFEST, write_manifest
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder, evaluation_config_of

if TYPE_CHECKING:
    from metatokens.data.tokenizer import AnyTokenizer

Text = str | Sequence[int] | Tensor
"""A string, or the ids of one text: a list, (T,) or (1, T)."""


def load(path: str | Path) -> LanguageModel:
    """Open a model and its tokenizer, on the CPU and in evaluation mode; `.model.to("cuda")` moves it.

    Args:
        path: A run, model or checkpoint folder, or `owner/name` of a model on the Hugging Face hub. A causal language
            model of another package opens too, with a meta-token added whose embedding is not trained.

    Raises:
        TypeError: The path is neither a string nor a Path.
        CheckpointError: There is no model, or it does not load.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"load takes a folder or the id of a model on the hub, not {type(path).__name__}")
    folder = ModelFolder(Path(path))
    run = folder.pretraining
    return LanguageModel(
        folder.open_model(),
        folder.tokenizer,
        injection=run.injection if run else None,
        evaluation=evaluation_config_of(folder, []) if folder.finetuning else None,
    )


class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: The model, as transformers knows it.
        injection: Where a string gets its meta-tokens, unless a method is told otherwise.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: AnyTokenizer,
        *,
        injection: Injection | None = None,
        evaluation: EvaluateConfig | None = None,
    ) -> None:
        """Put a model and its tokenizer together.

        Args:
            model: Any causal language model of transformers, such as `MetaTokenForCausalLM`.
            tokenizer: Its tokenizer: of transformers, a `tokenizers.Tokenizer`, or a name or folder.
            injection: Where its training put meta-tokens; None means the uniform policy at the paper's ratio for a
                model with meta-attention, and no meta-tokens for another.
            evaluation: The recall task it was trained on, with its lengths; None means that there is none.

        Raises:
            TypeError: The model is none.
        """
        if not hasattr(model, "config"):
            raise TypeError(
                f"a model is one of transformers, not {type(model).__name__}; metatokens.load opens a folder"
            )
        self.model = model
        self.injection: Injection = _usual_injection(model) if injection is None else injection
        self._guessed = self.injection if injection is None else None
        self._given_tokenizer = tokenizer
        self._evaluation = evaluation

    @classmethod
    def from_scratch(cls, tokenizer: AnyTokenizer, shape: ModelConfig | None = None, *, seed: int = 0) -> Self:
        """Return a model of new weights for a tokenizer, to be trained.

        Args:
            tokenizer: As above; the meta-token and padding become the first ids behind its text vocabulary.
            shape: Of the model; None means the paper's.
            seed: Of the weights.
        """
        encoder = TextEncoder(tokenizer)
        model = build_model(
            shape or ModelConfig(),
            text_vocab_size=encoder.vocab_size,
            eos_token_id=encoder.eos_token_id,
            seed=seed,
        )
        return cls(model, as_text_tokenizer(tokenizer))

    def save(self, path: str | Path) -> None:
        """Write model and tokenizer into a folder that `load` and `from_pretrained` open.

        Where the model states no schedule of its meta-tokens, the folder gets that of `injection`, if somebody has said
        where they stand; what `injection` is otherwise is a guess, and is not stated.

        Raises:
            UsageError: The model is grafted.
        """
        folder, model = Path(path), getattr(self.model, "wrapped", self.model)
        if hasattr(model, GRAFT):
            raise UsageError(
                "model",
                expected="one without a graft",
                found="a grafted one, whose new parts are a file of their own",
                remedy="call metatokens.graft.save_graft(language_model.model.wrapped, folder)",
            )
        stated = model.generation_config
        if getattr(stated, "meta_schedule", None) is None and self.injection is not self._guessed:
            model.generation_config = copy(stated)  # what the live model follows is not changed
            state_schedule(model.generation_config, schedule_for(self.injection))
        try:
            save_model(model, folder, self.tokenizer)
        finally:
            model.generation_config = stated
        if (folder / MANIFEST).exists():
            write_manifest(folder)

    def __repr__(self) -> str:
        """Show what kind of model it is, and how large."""
        parameters = f"{self.model.num_parameters():,} parameters"
        return f"LanguageModel({type(self.model).__name__}, {parameters}, injection={self.injection!r})"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, which has `meta_token_id` if the model has one."""
        if hasattr(self._given_tokenizer, "backend_tokenizer"):
            return self._given_tokenizer
        return build_hf_tokenizer(self._text_tokenizer)

    def inject(self, text: Text, injection: Injection | None = None, *, seed: int = 0) -> Tensor:
        """Return the ids of a text with meta-tokens in place, (1, T) int64 on the model's device.

        Args:
            text: Text without meta-tokens; a string that spells one is plain text.
            injection: Where they go; None means as in training.
            seed: Of the draws.

        Raises:
            UsageError: The model has no meta-token to inject.
        """
        injection = self._chosen(injection)
        meta_token_id: int | None = getattr(self.model.config, "meta_token_id", None)
        if meta_token_id is None and injection.kind != "none":
            raise UsageError(
                f"injection {injection.kind}",
                expected="a model with a meta-token",
                found="meta_token_id None",
                remedy="use NoInjection",
            )
        text_ids = self._encoder.encode_batch([text])[0].tolist() if isinstance(text, str) else _list_of(text)
        ends_clause = ends_clause_table(self._text_tokenizer) if injection.follows_punctuation else None
        ids = inject_into_prompt(
            text_ids, injection, meta_token_id=meta_token_id or 0, seed=seed, ends_clause=ends_clause
        )
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)

    def generate(
        self,
        prompt: str,
        *,
        every: int | None = None,
        schedule: MetaSchedule | None = None,
        max_text_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        show_meta: bool = False,
        memory: CompressedDocument | None = None,
    ) -> GeneratedText:
        """Continue a prompt, which gets its meta-tokens by the same schedule; see `generate_text`.

        Args:
            prompt: The text to continue.
            every: A meta-token after each `every` text tokens.
            schedule: Where meta-tokens go, in place of `every`; None means as the model's generation
                config says, or else as in training.
            max_text_tokens: Text tokens to write at most; None means 100, or fewer at the end of the window.
            temperature: 0 takes the likeliest token.
            top_k: Sample from the k likeliest tokens.
            top_p: Sample from the likeliest tokens that hold this probability.
            seed: Of the sampling.
            show_meta: Show meta-tokens in the text.
            memory: A document that `compress` has read, which the prompt follows.

        Raises:
            TypeError: The prompt is no string, the schedule is none, or both `every` and `schedule` are given.
            UsageError: See `generate_text`.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is a string, not {type(prompt).__name__}; for ids call .model.generate")
        if every is not None and schedule is not None:
            raise TypeError("give either every or schedule, not both")
        if schedule is not None and not hasattr(schedule, "is_due"):
            raise TypeError(f"a schedule is an object such as PeriodicSchedule(9), not {schedule!r}")
        if schedule is None and every is None and memory is not None:
            schedule = memory.schedule
        return generate_text(
            self.model,
            self._text_tokenizer,
            prompt,
            schedule=self._schedule(every, schedule),
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            show_meta=show_meta,
            memory=memory,
        )

    def compress(
        self, text: str, *, every: int | None = None, schedule: MetaSchedule | None = None
    ) -> CompressedDocument:
        """Read a text once, for many calls of `generate` with `memory`; the model must be in memory mode.

        Args:
            text: The document.
            every: A meta-token after each `every` text tokens.
            schedule: Where meta-tokens go, in place of `every`; None means as in `generate`.

        Raises:
            UsageError: See `compress_document`.
        """
        with evaluating(self.model):
            return compress_document(self.model, self._text_tokenizer, text, schedule=self._schedule(every, schedule))

    def _schedule(self, every: int | None, schedule: MetaSchedule | None) -> MetaSchedule:
        if every is not None:
            return PeriodicSchedule(text_tokens=every)
        return _usual_schedule(self.model, self.injection) if schedule is None else schedule

    def perplexity(
        self,
        texts: str | Path | Iterable[str | tuple[str, str]],
        injection: Injection | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        seed: int = 0,
    ) -> PerplexityResult:
        """Score texts in windows, each text token once; see `measure_perplexity`, which takes every other option.

        Args:
            texts: One text or several, each alone or as (name, text); or a Path, read as `metatokens prepare` does.
            injection: Meta-tokens of a window; None means as in training.
            window: Length of a window in text tokens; None means all positions of the model.
            stride: Text tokens by which the sliding windows move.
            seed: Of the injection and of the bootstrap.

        Raises:
            DataError: There is no text, or an empty one.
            UsageError: See `measure_perplexity`.
        """
        if isinstance(texts, Path):
            texts = ((document.source, document.text) for document in iterate_documents(str(texts)))
        injection = self._chosen(injection)
        options = PerplexityOptions(window=window, stride=stride, injection=injection, seed=seed)
        return measure_perplexity(self.model, texts, self._text_tokenizer, options)

    def recall(
        self,
        task: Task | str | None = None,
        *,
        size: tuple[int, int] | None = None,
        lengths: str | Sequence[str] | None = None,
        instances: int | None = None,
        seed: int | None = None,
    ) -> tuple[RecallRow, ...]:
        """Measure the accuracy on a recall task at each length of the prompt; see `evaluate_recall`.

        Args:
            task: A task, or the name of its kind, such as "copying"; None means the one that the model was trained on.
            size: Bounds of the task's own size.
            lengths: Length bins by name, or ranges of prompt tokens as "2049-4096"; None means those of the training,
                or the bins that the model's window holds.
            instances: Test instances at each length.
            seed: Of the test instances.

        Raises:
            TypeError: The task is neither a task nor a name.
            ValueError: There is no such task, or the model was trained on none.
            UsageError: The model has no meta-token, or the task cannot fill a length.
        """
        if getattr(self.model.config, "meta_token_id", None) is None:
            raise UsageError(
                "recall",
                expected="a model with a meta-token, behind which there is no text token",
                found="meta_token_id None",
                remedy="save it and open it with metatokens.load, which adds one",
            )
        defaults = self._evaluation
        if task is None:
            if defaults is None:
                raise ValueError("this model was trained on no recall task; name one, such as 'copying'")
            task = defaults.task
        elif isinstance(task, str):
            task = defaults.task if defaults and defaults.task.kind == task else find_task(task).config()
        elif not hasattr(task, "meta_places"):
            raise TypeError(f"a task is an object such as CopyingTask(), or its name, not {task!r}")
        if defaults is None or defaults.task.kind != task.kind:
            # a size and lengths of another task need not suit this one
            defaults = EvaluateConfig(lengths=_lengths_that_fit(sequence_limit(self.model)))
        lengths = (lengths,) if isinstance(lengths, str) else lengths
        asked = {"task": task, "size": size, "lengths": lengths, "instances": instances, "seed": seed}
        config = EvaluateConfig(**dict(defaults) | {name: value for name, value in asked.items() if value is not None})
        with evaluating(self.model):
            return evaluate_recall([self.model], config, PieceEncoder(self._encoder))

    @contextmanager
    def intervene(
        self, *interventions: Intervention | str, token_counts: npt.ArrayLike | None = None
    ) -> Iterator[Self]:
        """Change the model at its meta-tokens within the block, whatever runs it; see `interventions.intervene`.

        Args:
            interventions: Such as `ZeroEmbedding()`, or as on the command line, "zero_embedding".
            token_counts: (V,) how often each text token occurs; `MeanEmbedding` needs it.

        Raises:
            UsageError: The model lacks the part that an intervention changes, or two change the same part.
        """
        parsed = tuple(parse_intervention(one) if isinstance(one, str) else one for one in interventions)
        with intervene(self.model, parsed, token_counts):
            yield self

    def attention(self, text: Text) -> Attention:
        """Return the weights of both attentions in one text, for every head of every layer.

        Raises:
            ValueError: The text is empty or longer than the model, or has an id that the model lacks.
            UsageError: A model other than of this package, GPT-2 and GPT-Neo, or one whose attention is no softmax.
        """
        input_ids = self._ids_of(text)
        if not len(input_ids):
            raise ValueError("attention needs a text of at least one token")
        with evaluating(self.model):
            lens = self.lens()
            own, meta = weights_of_both_branches(lens, input_ids)
        return Attention(
            tokens=tuple(self.tokenizer.decode([token]) for token in input_ids.tolist()),
            is_meta=lens.is_meta(input_ids).cpu(),
            self_attention=own,
            meta_attention=meta,
        )

    def lens(self) -> Lens:
        """Return a lens on the model, which reads and changes its activations.

        Raises:
            UsageError: A model other than of this package, GPT-2 and GPT-Neo.
            ValueError: The model is in training mode.
        """
        return Lens(getattr(self.model, "wrapped", self.model))

    @cached_property
    def _text_tokenizer(self) -> Any:
        return as_text_tokenizer(self._given_tokenizer)

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self._text_tokenizer)

    def _chosen(self, injection: Injection | None) -> Injection:
        """Return an injection, by default that of the training."""
        if injection is None:
            return self.injection
        if not hasattr(injection, "num_meta"):
            raise TypeError(f"an injection is an object such as UniformInjection(0.1), not {injection!r}")
        return injection

    def _ids_of(self, text: Text) -> Tensor:
        """Return the ids (T,) of a text, on the model's device."""
        if isinstance(text, str):
            return self.inject(text)[0]
        ids = _list_of(text)
        if any(not 0 <= token < self.model.config.vocab_size for token in ids):
            raise ValueError(f"ids must lie in [0, {self.model.config.vocab_size}), the model's vocabulary")
        return torch.tensor(ids, dtype=torch.long, device=self.model.device)


def _usual_injection(model: Any) -> Injection:
    """Return the paper's policy for a model with meta-attention, and none for another."""
    config = model.config
    has_meta_attention = getattr(config, "meta_attention_layers", "none") not in ("none", [])
    if has_meta_attention and getattr(config, "meta_token_id", None) is not None:
        return UniformInjection()
    return NoInjection()


def _usual_schedule(model: Any, injection: Injection) -> MetaSchedule:
    """Return the schedule that the model states, or else the one of its training."""
    stated = read_schedule(getattr(model.generation_config, "meta_schedule", None))
    return stated or schedule_for(injection) or PeriodicSchedule()


def _lengths_that_fit(limit: int | None) -> tuple[str, ...]:
    """Return the length bins whose prompts fit a window; where none does, half the window."""
    fitting = tuple(name for name, (_, longest) in LENGTH_BINS.items() if limit is None or longest < limit)
    return fitting or (f"1-{(limit or 2) // 2}",)


def _list_of(ids: Sequence[int] | Tensor) -> list[int]:
    """Return the ids of one text as a list."""
    if isinstance(ids, Tensor):
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"ids of one text are integers of shape (T,) or (1, T), not {ids.dtype} {tuple(ids.shape)}"
            )
        return [int(token) for token in ids.tolist()]
    if not isinstance(ids, Sequence) or not all(isinstance(token, int) for token in ids):
        raise TypeError("a text is a string, or the ids of its tokens")
    return list(ids)
