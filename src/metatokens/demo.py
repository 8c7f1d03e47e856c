"""The demonstration: what tiny models do with their meta-tokens, in three chapters.

Copying: three models learn from scratch to copy a marked span of words: with meta-attention, with the same meta-tokens
but no meta-attention, and a plain one with about as many parameters. Each answers as trained and with something taken
from its meta-tokens. Reading: a plain language model and one with meta-tokens are trained on the text that comes with
every Python. Inside: the first of the copying models is analysed on a page.
"""

import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer

from metatokens.analysis.results import read_results, write_results
from metatokens.analysis.run import Identity, analyze
from metatokens.bench.turns import ratio, time_in_turns
from metatokens.config.analysis import AnalysisConfig, Part
from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.loading import load_preset
from metatokens.config.schema import Injection, PretrainConfig
from metatokens.config.tasks import Difficulty, length_bin
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare, split_of
from metatokens.data.shards import MANIFEST_NAME, TokenDataset
from metatokens.data.sources import PYTHON_DOCS, SourceOptions, iterate_documents
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import DataError, UsageError
from metatokens.evaluation.interventions import Intervention, NoMetaAttention, ZeroEmbedding, intervene
from metatokens.evaluation.perplexity import measure_perplexity
from metatokens.evaluation.recall import RecallRow, evaluate_recall
from metatokens.evaluation.statistics import Interval
from metatokens.evaluation.windows import PerplexityOptions
from metatokens.generation.decoding import PeriodicSchedule, generate_text
from metatokens.report import require_packages
from metatokens.storage import write_atomically
from metatokens.tasks.base import META, PieceEncoder
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import make_instance
from metatokens.training.finetuning import finetune
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder, analysis_config_of, open_model
from metatokens.training.pretraining import pretrain, vocabulary

Say = Callable[[str], None]

DEMO_BYTES = 2**28  # five models of about 1.5 million parameters, two checkpoints of each, and the tokens
VOCAB_SIZE = 4096
VALIDATION_FRACTION = 0.05
TEXT_TOKENS = 700_000
SAMPLE_PROMPT = "Return a list of"
SAMPLE_TEXT_TOKENS = 60
SAMPLE_TEMPERATURE = 0.8
READING_ARMS = {"plain": "tiny/plain", "meta": "tiny/meta"}
COPYING_PRESET = "tiny/recall"
RECALL_STEPS = 400
# meta-attention adds 4 x 128^2 to the 12 x 128^2 weights of each of the four layers: as many as 5.3 plain layers
COPYING_ARMS = {
    "meta-attention": (),
    "pause tokens": ("--start.model.meta_attention_layers", "none"),
    "five plain layers": (
        *("--start.model.meta_attention_layers", "none", "--start.model.num_hidden_layers", "5"),
        *("--task.meta_places.kind", "none"),
    ),
}
COPYING_LENGTHS = ("17-32", "33-64", "65-128")
ZEROED, SWITCHED_OFF = "meta-tokens zeroed", "meta-attention off"
CHANGES: Mapping[str, Mapping[str, Intervention]] = {
    "meta-attention": {ZEROED: ZeroEmbedding(), SWITCHED_OFF: NoMetaAttention()},
    "pause tokens": {ZEROED: ZeroEmbedding()},
    "five plain layers": {},
}
"""What is taken from the meta-tokens of each arm, after training."""
ANALYSED_ARM = "meta-attention"
ANALYSED_STATES = ("last meta-token", "token before it", "last token")
# what these take on two cores with nothing else to do
COPYING_STEP_SECONDS, READING_STEP_SECONDS = 0.15, 0.55
PREPARE_SECONDS, MEASURE_SECONDS, ANALYSIS_SECONDS = 20, 40, 60


@dataclass(frozen=True)
class Effort:
    """How carefully the demonstration measures what it has trained."""

    speed_rounds: int
    """Rounds of timing; each times one training step of each model."""
    recall_instances: int
    """Instances of each length."""
    documents: int | None
    """Validation documents that perplexity is measured on; None for all."""
    analysed_instances: int
    """Instances, and as many minimal pairs, that the page analyses."""
    parts: tuple[Part, ...]
    """Parts of the analysis."""
    fitted_instances: int
    """Further instances, to whose states bottlenecks and probes are fitted."""
    fitted_steps: int
    """Most training steps of a bottleneck or a probe of the page."""


EFFORT = Effort(
    speed_rounds=9,
    recall_instances=200,
    documents=None,
    analysed_instances=24,
    parts=get_args(Part),
    fitted_instances=400,
    fitted_steps=300,
)
LESS_EFFORT = Effort(
    speed_rounds=1,
    recall_instances=50,
    documents=20,
    analysed_instances=8,
    parts=("attention", "causal", "token_view"),
    fitted_instances=100,
    fitted_steps=50,
)
"""For a trial: a demonstration on less text or with fewer steps."""


@dataclass(frozen=True)
class Example:
    """A prompt of the test split up to its first question, and what one model answers by greedy decoding."""

    prompt: str
    """Each meta-token is written as _."""
    answer: str
    as_trained: str
    zeroed: str
    """With the embedding of every meta-token zeroed."""


@dataclass(frozen=True)
class CopyingArm:
    """What the demonstration measured of one model on the copying task."""

    name: str
    model: str
    """Folder for `from_pretrained`."""
    parameters: int
    training_flops: float
    rows: tuple[RecallRow, ...]
    """Accuracy by length of the prompt."""
    changed: Mapping[str, tuple[RecallRow, ...]]
    """The same with something taken from the meta-tokens; the keys are those of `CHANGES`."""


@dataclass(frozen=True)
class Copying:
    """The first chapter."""

    trained_to: int
    """Longest prompt in training, in text tokens."""
    example: Example
    """Of the arm with meta-attention: the first test prompt that it answers right, or the first of all."""
    arms: tuple[CopyingArm, ...]


@dataclass(frozen=True)
class ReadingArm:
    """What the demonstration measured of one language model."""

    model: str
    """Folder for `from_pretrained`."""
    parameters: int
    text_tokens: int
    text_tokens_per_second: float
    """Median over training steps; the two models were timed in turns."""
    perplexity: Interval
    """Per text token of the validation documents, with meta-tokens as in training."""


@dataclass(frozen=True)
class Reading:
    """The second chapter."""

    plain: ReadingArm
    meta: ReadingArm
    documents: int
    """Validation documents that perplexity is measured on."""
    meta_attention_cost: float
    """Training step with meta-attention / without it, on the same text and meta-tokens."""
    cost_per_text_token: float
    """Training step of the meta model / of the plain model, on the same text tokens."""
    sample: str


@dataclass(frozen=True)
class Inside:
    """The third chapter."""

    page: str | None
    """Path of the page on a copying model; None without the packages of the extra `report`."""


Chapter = Copying | Reading | Inside


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured."""

    copying: Copying
    reading: Reading
    inside: Inside


def reading_configs(folder: Path, text_tokens: int) -> dict[str, PretrainConfig]:
    """Return the configs of the language models, which differ only in the meta-tokens and their attention."""
    overrides = ["--data.path", str(folder / "tokens"), "--training.duration.tokens", str(text_tokens)]
    overrides += ["--evaluation.interval_steps", "50"]
    return {arm: load_preset(preset, overrides) for arm, preset in READING_ARMS.items()}


def copying_configs(steps: int) -> dict[str, FinetuneConfig]:
    """Return the configs of the copying runs: `steps` steps of the first stage of the preset's curriculum."""
    configs = {
        arm: load_preset(COPYING_PRESET, changes, schema=FinetuneConfig) for arm, changes in COPYING_ARMS.items()
    }
    return {
        arm: config.model_copy(update={"curriculum": (config.curriculum[0].model_copy(update={"steps": steps}),)})
        for arm, config in configs.items()
    }


def is_full_size(text_tokens: int, recall_steps: int) -> bool:
    """Tell whether a demonstration of this size measures everything; a smaller one is a trial."""
    return text_tokens >= TEXT_TOKENS and recall_steps >= RECALL_STEPS


def run_demo(
    folder: Path,
    *,
    text_tokens: int = TEXT_TOKENS,
    recall_steps: int = RECALL_STEPS,
    say: Say,
    show: Callable[[Chapter], None] = lambda _: None,
    show_progress: bool = True,
) -> DemoResult:
    """Run the demonstration in `folder`; finished parts are reused, and unfinished training goes on.

    Args:
        folder: holds everything that the demonstration makes.
        text_tokens: text tokens that each language model sees.
        recall_steps: training steps of each copying model.
        say: gets a line before every wait, with its length.
        show: gets every chapter as soon as it is measured.
        show_progress: show that of the trainings.
    """
    effort = EFFORT if is_full_size(text_tokens, recall_steps) else LESS_EFFORT
    copying = _copy(folder, copying_configs(recall_steps), effort, say=say, show_progress=show_progress)
    show(copying)
    reading = _read(folder, reading_configs(folder, text_tokens), effort, say=say, show_progress=show_progress)
    show(reading)
    inside = _look_inside(folder, effort, say)
    show(inside)
    return DemoResult(copying, reading, inside)


def duration(seconds: float) -> str:
    """Write a length of time as a person says it."""
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {10 * max(round(seconds / 10), 1)} s"


# Copying -----------------------------------------------------------------------------------------------------


def _copying_folder(folder: Path, arm: str) -> Path:
    return folder / "recall" / "-".join(arm.split())


def _copy(
    folder: Path, configs: Mapping[str, FinetuneConfig], effort: Effort, *, say: Say, show_progress: bool
) -> Copying:
    """Train every arm on the copying task; test it at its training lengths and beyond, as it is and changed."""
    arms = {}
    for number, (arm, config) in enumerate(configs.items(), start=1):
        wait = duration(config.total_steps * COPYING_STEP_SECONDS)
        say(f"Training model {number} of {len(configs)} to copy: {arm}, {config.total_steps} steps, {wait} ...")
        trained = finetune(config, _copying_folder(folder, arm), show_progress=show_progress, label=arm)
        test = EvaluateConfig(
            task=config.task,
            size=config.curriculum[-1].size,
            lengths=COPYING_LENGTHS,
            instances=effort.recall_instances,
            batch_size=config.training.micro_batch_blocks,
        )
        opened = ModelFolder(_copying_folder(folder, arm))
        model, encoder = opened.open_model(), PieceEncoder(TextEncoder(opened.tokenizer))
        rows = evaluate_recall([model], test, encoder)
        arms[arm] = CopyingArm(
            name=arm,
            model=trained.model,
            parameters=trained.num_parameters,
            training_flops=trained.training_flops,
            rows=rows,
            changed={
                name: evaluate_recall([model], test, encoder, interventions=(change,))
                for name, change in CHANGES[arm].items()
            },
        )
        if arm == ANALYSED_ARM:
            (outcomes,) = rows[0].sequence_outcomes
            index = outcomes.index(1.0) if 1.0 in outcomes else 0
            example = _ask(model, opened.tokenizer, test, encoder, index)
    return Copying(configs[ANALYSED_ARM].curriculum[-1].prompt_tokens[1], example, tuple(arms.values()))


def _ask(model: Any, tokenizer: Tokenizer, test: EvaluateConfig, encoder: PieceEncoder, index: int) -> Example:
    """Return the first question of a test instance of the first length, with the model's answers."""
    difficulty = Difficulty(size=test.size, prompt_tokens=length_bin(test.lengths[0]))
    instance = make_instance(test.task, difficulty, encoder=encoder, seed=test.seed, split="test", index=index)
    meta_token_id = model.config.meta_token_id
    row = encode_instance(instance, test.task, encoder=encoder, meta_token_id=meta_token_id)
    start, stop = row.answer_spans[0]
    prompt = torch.from_numpy(row.input_ids[None, :start])

    def answer(*changes: Intervention) -> str:
        with intervene(model, changes):
            output = model.generate(prompt, max_new_tokens=stop - start, do_sample=False)
        return tokenizer.decode(output[0, start:].tolist()).strip()

    pieces = instance.pieces[: instance.answer_pieces[0][0]]
    return Example(
        prompt="".join("_" if piece == META else piece for piece in pieces),
        answer=instance.answers[0],
        as_trained=answer(),
        zeroed=answer(CHANGES[ANALYSED_ARM][ZEROED]),
    )


# Reading -----------------------------------------------------------------------------------------------------


def _read(
    folder: Path, configs: Mapping[str, PretrainConfig], effort: Effort, *, say: Say, show_progress: bool
) -> Reading:
    """Train the language models on the same text, and measure their perplexity and speed."""
    tokens = folder / "tokens"
    if not (tokens / MANIFEST_NAME).exists():
        say(f"Encoding the text that comes with Python in {VOCAB_SIZE:,} tokens, {duration(PREPARE_SECONDS)} ...")
        prepare(
            PYTHON_DOCS,
            tokens,
            tokenizer=None,
            vocab_size=VOCAB_SIZE,
            validation_fraction=VALIDATION_FRACTION,
            shard_tokens=2**28,
            options=SourceOptions(),
        )
    for number, (arm, config) in enumerate(configs.items(), start=1):
        wait = duration(config.total_steps * READING_STEP_SECONDS)
        say(f"Training model {number} of {len(configs)} to read: {arm}, {config.total_steps} steps, {wait} ...")
        pretrain(config, folder / arm, show_progress=show_progress, label=arm)
    say(f"Measuring perplexity and speed, {duration(MEASURE_SECONDS)} ...")
    documents = list(islice(_validation_documents(), effort.documents))
    arms = {}
    with TokenDataset.open(tokens) as dataset:
        seconds = _time_steps(configs, dataset, effort.speed_rounds)
        for arm, config in configs.items():
            model, window = open_model(folder / arm), config.text_tokens_per_block
            arms[arm] = ReadingArm(
                model=str(folder / arm / "model"),
                parameters=model.num_parameters(),
                text_tokens=config.total_steps * config.training.batch_blocks * window,
                text_tokens_per_second=config.training.batch_blocks * window / statistics.median(seconds[arm]),
                perplexity=measure_perplexity(
                    model,
                    documents,
                    dataset.tokenizer(),
                    PerplexityOptions(window=window, stride=window, injection=config.injection),
                ).non_overlapping.perplexity,
            )
        sample = generate_text(
            model,
            dataset.tokenizer(),
            SAMPLE_PROMPT,
            schedule=PeriodicSchedule(text_tokens=9),
            max_text_tokens=SAMPLE_TEXT_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            seed=0,
        )
    return Reading(
        **arms,
        documents=len(documents),
        meta_attention_cost=ratio(seconds["meta"], seconds["pause"]).median,
        cost_per_text_token=ratio(seconds["meta"], seconds["plain"]).median,
        sample=SAMPLE_PROMPT + sample.text,
    )


def _validation_documents() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each document that `prepare` kept out of training."""
    for document in iterate_documents(PYTHON_DOCS):
        if split_of(document.text, VALIDATION_FRACTION) == "validation":
            yield document.source, document.text


def _time_steps(configs: Mapping[str, PretrainConfig], dataset: TokenDataset, rounds: int) -> dict[str, list[float]]:
    """Time training steps of plain, meta, and pause: the plain model on the meta model's very tokens."""
    meta = configs["meta"]
    arms = {**configs, "pause": meta.model_copy(update={"model": configs["plain"].model})}
    steps = {name: _training_step(config, config.injection, dataset) for name, config in arms.items()}
    return time_in_turns(steps, rounds=rounds)


def _training_step(config: PretrainConfig, injection: Injection, dataset: TokenDataset) -> Callable[[], None]:
    model = build_model(config.model, **vocabulary(dataset), seed=config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, fused=True)
    loader = BatchLoader(
        TokenBlocks(dataset, "train", config.text_tokens_per_block),
        injection=injection,
        block_size=config.data.block_size,
        batch_blocks=config.training.batch_blocks,
        seed=config.seed,
        meta_token_id=dataset.vocab_size,
        loss_policy=config.model.loss_policy,
    )
    batch = loader.batch_at(0).to_model_inputs()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Inside ------------------------------------------------------------------------------------------------------


def _look_inside(folder: Path, effort: Effort, say: Say) -> Inside:
    """Analyse the copying model with meta-attention, unless that is done, and write its page."""
    try:
        require_packages("the page at the end")
    except UsageError as error:
        say(f"{error}; ending without it")
        return Inside(page=None)
    from metatokens.report.page import PAGE_NAME, render_page

    run, out = _copying_folder(folder, ANALYSED_ARM), folder / "report"
    instances, steps = str(effort.analysed_instances), str(effort.fitted_steps)
    options = (
        *("--parts", json.dumps(effort.parts), "--documents", instances, "--subject.pairs", instances),
        # a few small bottlenecks: seconds in place of minutes
        *("--subject.fitted_instances", str(effort.fitted_instances)),
        *("--rate_distortion.betas", "[0.03, 0.1, 0.3, 1.0]"),
        *("--states", json.dumps(ANALYSED_STATES)),
        *("--rate_distortion.num_seeds", "2", "--rate_distortion.max_steps", steps, "--probe.max_steps", steps),
    )
    model = ModelFolder(run)
    config = analysis_config_of(model, None, options)
    identity = Identity(
        name=f"{ANALYSED_ARM}, trained to copy",
        weights_sha256=model.sha256,
        command=" ".join(["metatokens analyze", str(run), "--out", str(out), *map(shlex.quote, options)]),
    )
    page = out / PAGE_NAME
    if not (_is_analysed(out, config, identity) and page.exists()):
        say(f"Analysing the copying model with meta-attention, {duration(ANALYSIS_SECONDS)} ...")
        page.unlink(missing_ok=True)  # of an earlier analysis
        write_results(out, *analyze(model.open_model(), model.tokenizer, config, identity=identity))
        write_atomically(page, render_page(*read_results(out)))
    return Inside(page=str(page))


def _is_analysed(folder: Path, config: AnalysisConfig, identity: Identity) -> bool:
    """Tell whether a folder holds the results of this analysis of this model."""
    try:
        results, _ = read_results(folder)
    except DataError:  # there are none, or they are of another version
        return False
    wanted = (identity.weights_sha256, identity.command, config.model_dump(mode="json"))
    return (results.checkpoint["sha256"], results.command, results.config) == wanted
