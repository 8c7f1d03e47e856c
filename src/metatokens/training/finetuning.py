"""Fine-tuning on a recall task under a curriculum (paper section 3), with the same loop as pre-training."""

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from metatokens.config.finetuning import CheckpointStart, FinetuneConfig, FreshStart, Stage
from metatokens.config.tasks import Task
from metatokens.data.keyed_random import KeyedRandom
from metatokens.data.tokenizer import TextEncoder, build_hf_tokenizer, load_text_tokenizer, train_tokenizer
from metatokens.errors import UsageError
from metatokens.evaluation.recall import count_right_answers, make_test_instances
from metatokens.generation.decoding import sequence_limit
from metatokens.model import MetaTokenConfig
from metatokens.model.schedule import state_schedule
from metatokens.tasks.base import LengthRange, PieceEncoder
from metatokens.tasks.coupling import check_coupling
from metatokens.tasks.curriculum import RecallBatches
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import find_task
from metatokens.tasks.words import ITEMS, NAMES, SENTENCE_WORDS
from metatokens.training.distributed import Processes, join_processes
from metatokens.training.initialization import build_model, build_model_on_meta_device
from metatokens.training.loading import ModelFolder
from metatokens.training.loop import check_start, train
from metatokens.training.model_card import Training
from metatokens.training.result import TrainingResult
from metatokens.training.resuming import Resume
from metatokens.training.run_folder import RunFolder
from metatokens.training.setup import TrainingSetup, count_batch_flops
from metatokens.training.signals import collect_stop_signals

WORD_VOCABULARY = 4_096  # upper bound for a tokenizer trained on the tasks' words: each word fits as one token
_EVALUATION_BATCH = 64
_LONG_INSTANCES = 16  # instances drawn of each stage and size to find the longest


def finetune(
    config: FinetuneConfig,
    out: str | Path,
    *,
    show_progress: bool = True,
    label: str = "",
    stop_after: float | None = None,
    resume: str | Path | None = None,
    allow_change: Sequence[str] = (),
) -> TrainingResult:
    """Train a model on the task of `config` into the run folder `out`; continue from its last checkpoint, if any.

    Under torchrun every process calls this. For the arguments see `metatokens.training.pretraining.pretrain`, for
    signals and errors `metatokens.training.loop.train`.
    """
    with collect_stop_signals(stop_after) as stop, join_processes(config.training) as processes:
        return train(
            config,
            RunFolder(Path(out)),
            processes,
            lambda: _make_job(config, processes),
            stop=stop,
            show_progress=show_progress,
            label=label,
            resume=Resume.of(resume, allow_change),
        )


def plan(
    config: FinetuneConfig, out: str | Path, *, resume: str | Path | None = None, allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the plan of a run, for `--dry-run`; makes its first and last batch to measure them.

    Raises:
        UsageError, DataError, CheckpointError, ResourceError: the errors that the run would raise before its first
            step.
    """
    with join_processes(config.training) as processes:
        job = _make_job(config, processes)
        check_start(config, RunFolder(Path(out)), job, Resume.of(resume, allow_change))
    first, last = job.batches.batch_at(0), job.batches.batch_at(config.total_steps - 1)
    return {
        "parameters": job.model.num_parameters(),
        "task": config.task.kind,
        "steps": config.total_steps,
        "instances": config.total_steps * config.training.batch_blocks,
        "positions_of_the_first_batch": first.input_ids.shape[1],
        "positions_of_the_last_batch": last.input_ids.shape[1],
    }


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer in which each word of the tasks is one token."""
    return Tokenizer.from_str(_trained_on_words())


@cache  # a sweep needs it once per arm
def _trained_on_words() -> str:
    words = (*ITEMS, *NAMES, *SENTENCE_WORDS)
    text = "".join(f" {word} {word.title()}" for word in words) + "".join(f" {number}" for number in range(100))
    text += "List Bits Text Item Parity Copy Point Count: [ ] | , ."
    return train_tokenizer([text] * 8, WORD_VOCABULARY).to_str()


def _start(config: FinetuneConfig) -> tuple[Any, Tokenizer, str]:
    """Return the model that a run starts from, its text tokenizer, and its identity, empty for a new model."""
    start, tokenizer, identity = config.start, _start_tokenizer(config), ""
    if isinstance(start, FreshStart):
        encoder = TextEncoder(tokenizer)
        model = build_model(
            start.model, text_vocab_size=encoder.vocab_size, eos_token_id=encoder.eos_token_id, seed=config.seed
        )
    else:
        folder = ModelFolder(Path(start.path))
        model, identity = folder.open_model(seed=config.seed).train(), f"+{folder.sha256}"
        state_schedule(model.generation_config, None)  # the task says where meta-tokens stand
        _put_into_memory_mode(model, start)
    _check_length(config, model, tokenizer)
    return model, tokenizer, identity


def build_on_meta_device(config: FinetuneConfig) -> tuple[Any, Tokenizer]:
    """Return the run's initial model without its weights, on the meta device, and its text tokenizer."""
    start, tokenizer = config.start, _start_tokenizer(config)
    model: Any
    if isinstance(start, FreshStart):
        encoder = TextEncoder(tokenizer)
        model = build_model_on_meta_device(
            start.model, text_vocab_size=encoder.vocab_size, eos_token_id=encoder.eos_token_id
        )
    else:
        model = ModelFolder(Path(start.path)).build_on_meta_device()
        _put_into_memory_mode(model, start)
    _check_length(config, model, tokenizer)
    return model, tokenizer


def _put_into_memory_mode(model: Any, start: CheckpointStart) -> None:
    """Change the attention of a trained model as its start says.

    Raises:
        UsageError: the model is not one of this package, or its config does not go with memory mode.
    """
    if start.memory is None:
        return
    found = model.config.model_type
    try:
        if found != MetaTokenConfig.model_type:
            raise ValueError(f"a model of the kind {found}")
        model.config.memory = start.memory.to_hf()["memory"]
        model.config.validate_memory()
    except ValueError as error:
        raise UsageError(
            "start.memory",
            expected=f"a {MetaTokenConfig.model_type} model that can have it",
            found=str(error),
            remedy="leave start.memory off, or start from a model that was pre-trained with full attention",
        ) from None


def _start_tokenizer(config: FinetuneConfig) -> Tokenizer:
    start = config.start
    if isinstance(start, FreshStart):
        return word_tokenizer() if start.tokenizer is None else load_text_tokenizer(str(start.tokenizer))
    return ModelFolder(Path(start.path)).tokenizer


def _check_length(config: FinetuneConfig, model: Any, tokenizer: Tokenizer) -> None:
    """Refuse a stage whose longest instances, with meta-tokens and answers, exceed the model's window."""
    check_coupling(config.task, model.config)
    limit = sequence_limit(model)
    if limit is None:
        return
    counts = getattr(config.task, "coupling", None) is None
    encoder = PieceEncoder(TextEncoder(tokenizer))
    for stage in config.curriculum:
        longest = stage.prompt_tokens[1]
        found = f"{longest} text tokens before the answer"
        if longest <= limit or not counts:
            longest = _longest_instance(config.task, stage, encoder, model.config.meta_token_id)
            found = (
                f"an instance of {longest}, with its meta-tokens and answers" if counts else f"{longest} coupled ones"
            )
        if longest > limit:
            raise UsageError(
                f"curriculum: prompt_tokens up to {stage.prompt_tokens[1]}",
                expected=f"at most the {limit} positions of the model",
                found=found,
                remedy="shorten the last stages, or extend the model",
            )


def _longest_instance(task: Task, stage: Stage, encoder: PieceEncoder, meta_token_id: int) -> int:
    """Draw instances as long as the stage allows; return the positions of the longest, 0 if none can be drawn."""
    generate, room = find_task(task.kind).generate, LengthRange(*stage.prompt_tokens, "highest")
    longest = 0
    for size, key in product(stage.size, range(_LONG_INSTANCES)):
        instance = generate(task, size, room, encoder=encoder, random=KeyedRandom(key))
        if instance is not None:
            encoded = encode_instance(instance._replace(key=key), task, encoder=encoder, meta_token_id=meta_token_id)
            longest = max(longest, encoded.num_positions)
    return longest


def training_batches(
    config: FinetuneConfig, model: Any, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1
) -> RecallBatches:
    """Return the batches of a run; only the config of `model` is read."""
    return RecallBatches(
        config,
        PieceEncoder(TextEncoder(tokenizer)),
        meta_token_id=model.config.meta_token_id,
        pad_token_id=model.config.pad_token_id,
        loss_policy=getattr(model.config, "loss_policy", "skip"),
        num_positions=sequence_limit(model),
        rank=rank,
        world_size=world_size,
    )


def _make_job(config: FinetuneConfig, processes: Processes) -> TrainingSetup:
    model, tokenizer, start_id = _start(config)
    identity = f"{config.task.model_dump_json(exclude_none=True)}/{TextEncoder(tokenizer).sha256}"
    evaluation = config.solve or config.evaluation
    return TrainingSetup(
        model=model,
        tokenizer=build_hf_tokenizer(tokenizer),
        content_id=hashlib.sha256(identity.encode()).hexdigest() + start_id,
        made=Training(
            "finetune",
            data=f"generated instances of the recall task {config.task.kind}",
            base_model="" if isinstance(config.start, FreshStart) else config.start.path,
        ),
        batches=training_batches(config, model, tokenizer, rank=processes.rank, world_size=processes.world_size),
        count_flops=lambda batch: count_batch_flops(model, batch),
        evaluate=None
        if evaluation.interval_steps is None
        else _Validation(config, evaluation.instances, processes, model, tokenizer).measure,
        evaluation_steps=evaluation.interval_steps,
        solve=config.solve,
    )


class _Validation:
    """Accuracy on fixed test instances at the difficulty of the last stage; every process does its share."""

    def __init__(
        self, config: FinetuneConfig, num_instances: int, processes: Processes, model: Any, tokenizer: Tokenizer
    ) -> None:
        self._model = model
        instances = make_test_instances(
            config.task,
            config.curriculum[-1].difficulty,
            encoder=PieceEncoder(TextEncoder(tokenizer)),
            meta_token_id=model.config.meta_token_id,
            seed=config.seed,
            instances=num_instances,
        )
        self._instances = instances[processes.rank :: processes.world_size]

    def measure(self) -> dict[str, tuple[float, float]]:
        """Return sum and count of what is averaged over instances: right tokens, right answers, chance."""
        counts = count_right_answers(self._model, self._instances, batch_size=_EVALUATION_BATCH)
        return {
            "token_accuracy": (float(counts.right_tokens.sum()), float(counts.tokens.sum())),
            "sequence_accuracy": (float(counts.right_answers.sum()), float(counts.answers.sum())),
            "chance": (sum(instance.chance for instance in self._instances), float(len(self._instances))),
        }
