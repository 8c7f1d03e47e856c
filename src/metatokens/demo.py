"""The demonstration: from the text that comes with every Python to a table, a sample, a checkpoint and a recall task.

The demonstration trains a tokenizer and two tiny models, one plain and one with meta-tokens, on the same text tokens
from the same seed. Then it trains three models from scratch to copy a marked span of words: with meta-attention, with
the same meta-tokens but no meta-attention, and a plain one with about as many parameters. Last it analyses the first of
these three in a report.
"""

import json
import shlex
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from metatokens.analysis.results import read_results, write_results
from metatokens.analysis.run import Identity, analyze
from metatokens.config.analysis import AnalysisConfig
from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.loading import load_preset
from metatokens.config.schema import Injection, PretrainConfig
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare, split_of
from metatokens.data.shards import MANIFEST_NAME, TokenDataset
from metatokens.data.sources import PYTHON_DOCS, SourceOptions, iterate_documents
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import DataError, UsageError
from metatokens.evaluation.perplexity import PerplexityOptions, measure_perplexity
from metatokens.evaluation.recall import RecallRow, evaluate_recall
from metatokens.evaluation.speed import median_ratio, time_in_turns
from metatokens.evaluation.statistics import Interval
from metatokens.generation.decoding import PeriodicSchedule, generate_text
from metatokens.report import require_packages
from metatokens.tasks.base import PieceEncoder
from metatokens.training.finetuning import finetune
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder, analysis_config_of, open_model
from metatokens.training.pretraining import pretrain, vocabulary

DEMO_BYTES = 2**28  # five models of about 1.5 million parameters, two checkpoints of each, and the tokens
VOCAB_SIZE = 4096
VALIDATION_FRACTION = 0.05
TEXT_TOKENS = 1_000_000
SAMPLE_PROMPT = "Return a list of"
SAMPLE_TEXT_TOKENS = 60
SAMPLE_TEMPERATURE = 0.8
ARMS = {"plain": "tiny/plain", "meta": "tiny/meta"}
RECALL_PRESET = "tiny/recall"
RECALL_STEPS = 400  # about a minute an arm on two cores
# meta-attention adds 4 x 128^2 to the 12 x 128^2 weights of each of the four layers: as many as 5.3 plain layers
RECALL_ARMS = {
    "meta-attention": (),
    "pause tokens": ("--start.model.meta_attention_layers", "none"),
    "five plain layers": (
        *("--start.model.meta_attention_layers", "none", "--start.model.num_hidden_layers", "5"),
        *("--task.meta_places.kind", "none"),
    ),
}
RECALL_LENGTHS = ("17-32", "33-64", "65-128")
ANALYSED_ARM = "meta-attention"
ANALYSED_STATES = ("last meta-token", "token before it", "last token")


@dataclass(frozen=True)
class Effort:
    """How carefully the demonstration measures what it has trained."""

    speed_rounds: int
    """Rounds of timing; each times one training step of each model."""
    recall_instances: int
    """Instances of each length."""
    analysed_instances: int
    """Instances, and as many minimal pairs, that the report analyses."""
    fitted_instances: int
    """Further instances, to whose states bottlenecks and probes are fitted."""
    fitted_steps: int
    """Most training steps of a bottleneck or a probe of the report."""


EFFORT = Effort(speed_rounds=9, recall_instances=200, analysed_instances=24, fitted_instances=400, fitted_steps=300)
LESS_EFFORT = Effort(speed_rounds=1, recall_instances=50, analysed_instances=8, fitted_instances=100, fitted_steps=50)
"""For a trial: a demonstration on less text or with fewer steps."""


@dataclass(frozen=True)
class ArmResult:
    """What the demonstration measured of one model."""

    model: str
    """Folder for `from_pretrained`."""
    parameters: int
    text_tokens: int
    text_tokens_per_second: float
    """Median over training steps; the two models were timed in turns."""
    perplexity: Interval
    """Per text token of the validation documents, with meta-tokens as in training."""


@dataclass(frozen=True)
class RecallArm:
    """What the demonstration measured of one model on the copying task."""

    name: str
    model: str
    """Folder for `from_pretrained`."""
    parameters: int
    training_flops: float
    rows: tuple[RecallRow, ...]
    """Accuracy by length of the prompt."""


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured."""

    plain: ArmResult
    meta: ArmResult
    meta_attention_cost: float
    """Training step with meta-attention / without it, on the same text and meta-tokens."""
    cost_per_text_token: float
    """Training step of the meta model / of the plain model, on the same text tokens."""
    sample: str
    recall: tuple[RecallArm, ...]
    report: str | None
    """Path of the page on a recall model; None without the packages of the extra `report`."""


def demo_configs(folder: Path, text_tokens: int) -> dict[str, PretrainConfig]:
    """Return the configs of the two runs, which differ only in the meta-tokens and their attention."""
    overrides = ["--data.path", str(folder / "tokens"), "--training.duration.tokens", str(text_tokens)]
    overrides += ["--evaluation.interval_steps", "50"]
    return {arm: load_preset(preset, overrides) for arm, preset in ARMS.items()}


def recall_configs(steps: int) -> dict[str, FinetuneConfig]:
    """Return the configs of the copying runs: `steps` steps of the first stage of the preset's curriculum."""
    configs = {arm: load_preset(RECALL_PRESET, changes, schema=FinetuneConfig) for arm, changes in RECALL_ARMS.items()}
    return {
        arm: config.model_copy(update={"curriculum": (config.curriculum[0].model_copy(update={"steps": steps}),)})
        for arm, config in configs.items()
    }


def run_demo(
    folder: Path,
    *,
    text_tokens: int = TEXT_TOKENS,
    recall_steps: int = RECALL_STEPS,
    say: Callable[[str], None],
    show_progress: bool = True,
) -> DemoResult:
    """Run the demonstration in `folder`; finished parts are reused, and unfinished training goes on."""
    try:
        require_packages("the report at the end")
        can_report = True
    except UsageError as error:
        say(f"{error}; going on without it")
        can_report = False
    tokens = folder / "tokens"
    if not (tokens / MANIFEST_NAME).exists():
        say(f"Training a tokenizer of {VOCAB_SIZE} tokens on the text that comes with Python, and encoding it ...")
        prepare(
            PYTHON_DOCS,
            tokens,
            tokenizer=None,
            vocab_size=VOCAB_SIZE,
            validation_fraction=VALIDATION_FRACTION,
            shard_tokens=2**28,
            options=SourceOptions(),
        )
    effort = EFFORT if text_tokens >= TEXT_TOKENS and recall_steps >= RECALL_STEPS else LESS_EFFORT
    configs = demo_configs(folder, text_tokens)
    for arm, config in configs.items():
        text = config.text_tokens_per_block
        block = f"{config.training.batch_blocks} x ({text} text + {config.data.block_size - text} meta) tokens"
        say(f"Training {arm}: {config.total_steps} steps of {block} ...")
        pretrain(config, folder / arm, show_progress=show_progress, label=arm)
    say("Timing training steps in turns, measuring perplexity, generating ...")
    with TokenDataset.open(tokens) as dataset:
        seconds = _time_steps(configs, dataset, effort.speed_rounds)
        documents = list(_validation_documents())
        arms = {}
        for arm, config in configs.items():
            model = open_model(folder / arm)
            window = config.text_tokens_per_block
            arms[arm] = ArmResult(
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
    return DemoResult(
        **arms,
        meta_attention_cost=median_ratio(seconds, "meta", "pause"),
        cost_per_text_token=median_ratio(seconds, "meta", "plain"),
        sample=SAMPLE_PROMPT + sample.text,
        recall=tuple(_run_recall(folder, recall_configs(recall_steps), effort, say=say, show_progress=show_progress)),
        report=_report(folder, effort, say) if can_report else None,
    )


def _report(folder: Path, effort: Effort, say: Callable[[str], None]) -> str:
    """Analyse the recall model with meta-attention, unless that is done, and return the path of its page."""
    from metatokens.report.page import write_report

    run, out = _recall_folder(folder, ANALYSED_ARM), folder / "report"
    instances, steps = str(effort.analysed_instances), str(effort.fitted_steps)
    options = (
        *("--documents", instances, "--subject.pairs", instances),
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
    if not _is_analysed(out, config, identity):
        say("Analysing the model with meta-attention ...")
        write_results(out, *analyze(model.open_model(), model.tokenizer, config, identity=identity))
    return str(write_report(out))


def _is_analysed(folder: Path, config: AnalysisConfig, identity: Identity) -> bool:
    """Tell whether a folder holds the results of this analysis of this model."""
    try:
        results, _ = read_results(folder)
    except DataError:  # there are none, or they are of another version
        return False
    wanted = (identity.weights_sha256, identity.command, config.model_dump(mode="json"))
    return (results.checkpoint["sha256"], results.command, results.config) == wanted


def _recall_folder(folder: Path, arm: str) -> Path:
    return folder / "recall" / "-".join(arm.split())


def _run_recall(
    folder: Path, configs: dict[str, FinetuneConfig], effort: Effort, *, say: Callable[[str], None], show_progress: bool
) -> Iterator[RecallArm]:
    """Train every arm on the copying task and evaluate it at its training lengths and beyond."""
    for arm, config in configs.items():
        say(f"Training to copy a marked span, {arm}: {config.total_steps} steps of {config.training.batch_blocks} ...")
        out = _recall_folder(folder, arm)
        result = finetune(config, out, show_progress=show_progress, label=arm)
        evaluation = EvaluateConfig(
            task=config.task,
            size=config.curriculum[-1].size,
            lengths=RECALL_LENGTHS,
            instances=effort.recall_instances,
            batch_size=config.training.micro_batch_blocks,
        )
        encoder = PieceEncoder(TextEncoder(ModelFolder(out).tokenizer))
        yield RecallArm(
            name=arm,
            model=result.model,
            parameters=result.num_parameters,
            training_flops=result.training_flops,
            rows=evaluate_recall([open_model(out)], evaluation, encoder),
        )


def _validation_documents() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each document that `prepare` kept out of training."""
    for document in iterate_documents(PYTHON_DOCS):
        if split_of(document.text, VALIDATION_FRACTION) == "validation":
            yield document.source, document.text


def _time_steps(configs: dict[str, PretrainConfig], dataset: TokenDataset, rounds: int) -> dict[str, list[float]]:
    """Time training steps of plain, meta, and pause: the plain model on the meta model's very tokens."""
    meta = configs["meta"]
    timed = {**configs, "pause": meta.model_copy(update={"model": configs["plain"].model})}
    steps = {name: _training_step(config, config.injection, dataset) for name, config in timed.items()}
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
