"""The command line: parse, dispatch, exit code, error text. What a verb does lives elsewhere.

Every verb takes `--json` (the result alone on standard output); those that work long take `--dry-run`. Anything wrong
is one line on standard error and the exit code of `metatokens.errors`; `--debug` shows the traceback.
"""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import metatokens
from metatokens.errors import MetaTokensError, Preempted, ResourceError, UsageError
from metatokens.report.console import show_demo, show_perplexity, show_recall, show_rows, show_table, show_verdicts

Verb = Callable[[argparse.Namespace], int]
"""Does the work of a command and returns its exit code."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("command line", expected="valid arguments", found=message, remedy=f"see `{self.prog} -h`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            options = _parse([argument for argument in arguments if argument != "--debug"])
            verb: Verb = options.verb
            return verb(options)
    except (MetaTokensError, Preempted) as error:
        if debug:
            raise
        if not error.is_repeated:
            print(f"metatokens: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("metatokens: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the top level: whatever it is, it ends in one line
        if debug:
            raise
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "lower training.micro_batch_blocks" if out_of_memory else "--debug shows where"
        print(f"metatokens: {cause}; {remedy}", file=sys.stderr)
        return ResourceError.exit_code if out_of_memory else 1


def _show_warning(message: Warning | str, *details: Any) -> None:
    del details
    print(f"metatokens: warning: {' '.join(str(message).split())}", file=sys.stderr)


# Parsing -----------------------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="metatokens", description="Language models with learned meta-tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metatokens {metatokens.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in _VERBS:
        add(verbs)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.verb not in (_pretrain, _extend, _finetune, _evaluate, _sweep, _analyze):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    return options


def _at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number in a range; it is checked before anything is loaded."""

    def whole_number(text: str) -> int:
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and less than 2^63")
        return int(text)

    return whole_number


def _ratio(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and less than 1")
    return float(text)


def _verb(verbs: Any, name: str, verb: Verb, text: str, *, long: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(verb=verb)
    parser.add_argument("--json", action="store_true", help="write the result as JSON, alone on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if long:
        parser.add_argument("--dry-run", action="store_true", help="check everything and say what would happen")
    return parser


def _add_demo(verbs: Any) -> None:
    text = "train a plain and a meta-token model on the text that comes with Python, compare them, generate"
    parser = _verb(verbs, "demo", _demo, text, long=True)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demonstration")
    parser.add_argument(
        "--text-tokens", type=_at_least(1), default=1_000_000, help="text tokens that each language model sees"
    )
    parser.add_argument(
        "--recall-steps", type=_at_least(1), default=400, help="training steps of each model on the recall task"
    )


def _add_prepare(verbs: Any) -> None:
    parser = _verb(verbs, "prepare", _prepare, "tokenise text into verified shards", long=True)
    parser.add_argument(
        "source",
        nargs="?",
        default="python-docs",
        help="a .txt, .jsonl or .parquet file (.gz, .zst too), a folder, a dataset id on the hub, or python-docs",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", help="folder, tokenizer.json or hub id; without it one is trained on the source")
    parser.add_argument("--vocab-size", type=_at_least(257), default=4096, help="of a tokenizer trained here")
    parser.add_argument(
        "--validation-fraction", type=_ratio, default=0.02, help="share of documents kept out of training"
    )
    parser.add_argument("--shard-tokens", type=_at_least(1), default=2**28, help="tokens of a shard, about")
    parser.add_argument(
        "--text-field", default="text", help="column of jsonl, parquet and datasets that holds the text"
    )
    parser.add_argument("--config-name", help="configuration of a Hugging Face dataset, such as en")
    parser.add_argument("--split", default="train", help="split of a Hugging Face dataset")
    parser.add_argument("--max-documents", type=_at_least(1), help="stop after so many documents")
    parser.add_argument(
        "--on-bad-text", choices=("error", "replace", "skip"), default="error", help="for text that is not valid UTF-8"
    )


def _add_pretrain(verbs: Any) -> None:
    text = "pre-train a preset; picks up where it was; under torchrun on several devices"
    _add_run(_verb(verbs, "pretrain", _pretrain, text, long=True), "metatokens.config.schema:PretrainConfig")


def _add_extend(verbs: Any) -> None:
    text = "give a model a longer window: scale its RoPE, then train shortly on long blocks; picks up where it was"
    parser = _verb(verbs, "extend", _extend, text, long=True)
    parser.add_argument("checkpoint", type=Path, help="run, model or checkpoint folder of the trained model")
    parser.add_argument(
        "--method", choices=("yarn", "linear", "dynamic"), default="yarn", help="how RoPE is scaled (default: yarn)"
    )
    parser.add_argument("--factor", type=float, default=4.0, help="new window / present window (default: 4)")
    parser.add_argument("--out", type=Path, required=True, help="run folder; with --no-training, a new model folder")
    parser.add_argument("--preset", default="paper/extend", help="of the training: paper/extend, small/extend ...")
    parser.add_argument("--no-training", action="store_true", help="only write the model with its RoPE scaled")
    _describe_overrides(parser, "metatokens.config.schema:PretrainConfig")


def _add_finetune(verbs: Any) -> None:
    text = "train on a recall task under a curriculum; picks up where it was; under torchrun on several devices"
    _add_run(_verb(verbs, "finetune", _finetune, text, long=True), "metatokens.config.finetuning:FinetuneConfig")


def _add_run(parser: argparse.ArgumentParser, schema: str) -> None:
    parser.add_argument("preset", help="name of a preset (see `metatokens info --presets`) or a YAML file")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
    _describe_overrides(parser, schema)


def _add_evaluate(verbs: Any) -> None:
    text = "accuracy on a recall task by length of the prompt and intervention, with intervals"
    parser = _verb(verbs, "evaluate", _evaluate, text, long=True)
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="model, checkpoint or run folders; several are one arm, a seed each"
    )
    _add_interventions(parser)
    parser.add_argument("--out", type=Path, help="file for the result as JSON, whatever is shown")
    _describe_overrides(parser, "metatokens.config.finetuning:EvaluateConfig")


def _add_sweep(verbs: Any) -> None:
    text = "fine-tune and evaluate a grid of runs; skips what is done and picks up where it was"
    parser = _verb(verbs, "sweep", _sweep, text, long=True)
    parser.add_argument("file", type=Path, help="YAML file of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the results")
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--jobs", type=_at_least(1), default=1, help="runs at a time, which share the cores of this machine"
    )
    places.add_argument("--gpus", help="indices as 0,1,2: a run at a time on each")
    parser.add_argument("--figures", action="store_true", help="draw OUT/figures/*.png from the results")
    _describe_overrides(parser, "metatokens.config.sweep:SweepConfig")


def _add_perplexity(verbs: Any) -> None:
    parser = _verb(verbs, "perplexity", _perplexity, "windowed perplexity of a model on text", long=True)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument("text", help="a source as for `prepare`; every document is scored on its own")
    parser.add_argument("--window", type=_at_least(1), help="length of a window (default: all positions of the model)")
    parser.add_argument(
        "--window-unit", choices=("text", "positions"), default="text", help="whether meta-tokens count in the window"
    )
    parser.add_argument(
        "--stride",
        type=_at_least(1),
        help="text tokens that a sliding window moves by (default: 256, at most half a window)",
    )
    parser.add_argument(
        "--injection", choices=("none", "periodic", "uniform"), default="none", help="meta-tokens at evaluation"
    )
    parser.add_argument("--ratio", type=_ratio, default=0.1, help="share of positions that are meta-tokens")
    _add_interventions(parser)
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of the uniform injection")
    parser.add_argument("--max-documents", type=_at_least(1), help="stop after so many documents")
    parser.add_argument("--max-tokens", type=_at_least(1), help="score the first so many text tokens of each document")
    parser.add_argument("--batch-size", type=_at_least(1), default=16, help="windows of one forward pass")


def _add_interventions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--intervention",
        action="append",
        metavar="KIND",
        default=[],
        help="what is changed at the meta-tokens, several times to combine: zero_embedding, mean_embedding, "
        "token_embedding=ID, zero_position, no_position_edges, no_meta_attention[=LAYER,LAYER...]",
    )


def _add_analyze(verbs: Any) -> None:
    text = "take a model apart: attention, cause, compression, with intervals and a verdict on each claim of the paper"
    parser = _verb(verbs, "analyze", _analyze, text, long=True)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument("--text", help="a source as for `prepare`; without it the instances of the run's recall task")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and arrays.npz")
    _describe_overrides(parser, "metatokens.config.analysis:AnalysisConfig")


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", _report, "render an analysis as one HTML page, and as figures for papers")
    parser.add_argument("results", type=Path, help="folder that `analyze` wrote")
    parser.add_argument("--out", type=Path, help="folder of the page and the figures (default: that folder)")


def _add_generate(verbs: Any) -> None:
    parser = _verb(verbs, "generate", _generate, "continue a prompt, with meta-tokens on a schedule")
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument("prompt", nargs="?", default="-", help="text to continue; - reads standard input")
    parser.add_argument("--max-text-tokens", type=_at_least(1), default=100, help="text tokens to write")
    parser.add_argument(
        "--schedule", choices=("none", "periodic", "uniform"), default="periodic", help="where meta-tokens go"
    )
    parser.add_argument("--every", type=_at_least(1), default=9, help="periodic: text tokens between meta-tokens")
    parser.add_argument("--ratio", type=_ratio, default=0.1, help="uniform: chance of a meta-token")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=_at_least(1), help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of sampling and of the uniform schedule")
    parser.add_argument("--show-meta", action="store_true", help="show meta-tokens in the text")


def _add_info(verbs: Any) -> None:
    text = "parameters, operations per token, memory, and what differs from the paper"
    parser = _verb(verbs, "info", _info, text)
    parser.add_argument("model", nargs="?", help="preset, YAML file, or model, checkpoint or run folder")
    parser.add_argument("--text-vocab-size", type=_at_least(1), default=50_257, help="tokens of the text, for a preset")
    parser.add_argument("--presets", action="store_true", help="list the presets")


def _describe_overrides(parser: argparse.ArgumentParser, schema: str) -> None:
    """Add the fields of a config class, `module:name`, to a parser's help; imported only when it is asked for."""

    def format_help() -> str:
        from metatokens.config.loading import describe_fields

        module, name = schema.split(":")
        lines = ["", "fields, each an override `--section.key VALUE` (YAML values, null = off):"]
        for path, default, text in describe_fields(getattr(import_module(module), name)):
            if text:
                lines.append(f"  --{path} [{default}]\n      {text}")
        return argparse.ArgumentParser.format_help(parser) + "\n".join(lines) + "\n"

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.format_help = format_help  # type: ignore[method-assign]


_VERBS = (
    _add_demo,
    _add_prepare,
    _add_pretrain,
    _add_extend,
    _add_finetune,
    _add_evaluate,
    _add_sweep,
    _add_perplexity,
    _add_analyze,
    _add_report,
    _add_generate,
    _add_info,
)

# Output ------------------------------------------------------------------------------------------------------


def _emit(options: argparse.Namespace, result: Any, show: Callable[[], None]) -> int:
    """Write the result as JSON, or show it to a person."""
    if options.json:
        tree = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(json.dumps(tree, indent=2, default=str))
    else:
        show()
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Verbs -------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from metatokens.demo import demo_configs, recall_configs, run_demo

    if options.dry_run:
        configs = {**demo_configs(options.out, options.text_tokens), **recall_configs(options.recall_steps)}
        rows = {arm: f"{config.total_steps} steps" for arm, config in configs.items()}
        return _emit(options, {"out": str(options.out), **rows}, lambda: show_table("demo would train", rows))
    result = run_demo(options.out, text_tokens=options.text_tokens, recall_steps=options.recall_steps, say=_say)
    return _emit(options, result, lambda: show_demo(result))


def _injection(kind: str, ratio: float) -> Any:
    from metatokens.config.schema import NoInjection, PeriodicInjection, UniformInjection

    if kind == "none":
        return NoInjection()
    return {"periodic": PeriodicInjection, "uniform": UniformInjection}[kind](ratio=ratio)


def _prepare(options: argparse.Namespace) -> int:
    from metatokens.data.prepare import check, prepare
    from metatokens.data.sources import SourceOptions, source_files

    source_options = SourceOptions(
        text_field=options.text_field,
        config_name=options.config_name,
        split=options.split,
        on_bad_text=options.on_bad_text,
        max_documents=options.max_documents,
    )
    arguments = {
        "tokenizer": options.tokenizer,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
    }
    if options.dry_run:
        check(options.source, options.out, **arguments)
        files = source_files(options.source)
        plan = {
            "source": options.source,
            "files": len(files),
            "bytes_on_disk": sum(file.stat().st_size for file in files),
            "tokenizer": options.tokenizer or f"trained here, {options.vocab_size} tokens",
            "out": str(options.out),
        }
        return _emit(options, plan, lambda: show_table("prepare would read", plan))
    manifest = prepare(
        options.source,
        options.out,
        **arguments,
        vocab_size=options.vocab_size,
        options=source_options,
        progress=_show_bytes if sys.stderr.isatty() else None,
    )
    splits = ("train", "validation")
    tokens = {split: sum(shard.num_tokens for shard in manifest.shards if shard.split == split) for split in splits}
    documents = {split: sum(s.num_documents for s in manifest.shards if s.split == split) for split in splits}
    result = {
        "out": str(options.out),
        "vocab_size": manifest.vocab_size,
        **{f"{split}_tokens": count for split, count in tokens.items()},
        **{f"{split}_documents": count for split, count in documents.items()},
        "documents_skipped": manifest.num_documents_skipped,
        "content_id": manifest.content_id,
    }
    return _emit(options, result, lambda: show_table("prepared", result))


def _show_bytes(num_bytes: int, num_tokens: int) -> None:
    print(f"\r{num_bytes / 1e6:,.1f} MB, {num_tokens:,} tokens", end="", file=sys.stderr, flush=True)


def _pretrain(options: argparse.Namespace) -> int:
    from metatokens.config.loading import load_preset

    config = load_preset(options.preset, options.overrides)
    from metatokens.training.distributed import is_main_process
    from metatokens.training.pretraining import plan, pretrain

    out = options.out or Path("runs") / Path(options.preset).stem
    if options.dry_run:
        rows = {"out": str(out), **plan(config, out)}
        return _emit(options, rows, lambda: show_table("pretrain would do", rows))
    result = pretrain(config, out)
    if not is_main_process():
        return 0
    return _emit(options, result, lambda: show_table("pre-trained", asdict(result)))


def _extend(options: argparse.Namespace) -> int:
    from metatokens.training.distributed import is_main_process
    from metatokens.training.extension import describe_extension, plan_extension, write_untrained
    from metatokens.training.pretraining import plan, pretrain

    config = plan_extension(
        options.checkpoint,
        method=options.method,
        factor=options.factor,
        preset=options.preset,
        overrides=options.overrides,
    )
    rows = {"out": str(options.out), **describe_extension(config)}
    if options.dry_run:
        more = write_untrained(config, options.out, dry_run=True) if options.no_training else plan(config, options.out)
        rows |= more
        return _emit(options, rows, lambda: show_table("extend would do", rows))
    if options.no_training:
        result = write_untrained(config, options.out) if is_main_process() else {}
    else:
        result = {**asdict(pretrain(config, options.out)), **describe_extension(config)}
    return _emit(options, result, lambda: show_table("extended", result)) if is_main_process() else 0


def _finetune(options: argparse.Namespace) -> int:
    from metatokens.config.finetuning import FinetuneConfig
    from metatokens.config.loading import load_preset

    config = load_preset(options.preset, options.overrides, schema=FinetuneConfig)
    from metatokens.training.distributed import is_main_process
    from metatokens.training.finetuning import finetune, plan

    out = options.out or Path("runs") / Path(options.preset).stem
    if options.dry_run:
        rows = {"out": str(out), **plan(config, out)}
        return _emit(options, rows, lambda: show_table("finetune would do", rows))
    result = finetune(config, out)
    if not is_main_process():
        return 0
    return _emit(options, result, lambda: show_table("fine-tuned", asdict(result)))


def _evaluate(options: argparse.Namespace) -> int:
    from metatokens.data.tokenizer import TextEncoder
    from metatokens.evaluation.interventions import check_interventions, parse_intervention
    from metatokens.evaluation.recall import evaluate_recall, report
    from metatokens.tasks.base import PieceEncoder
    from metatokens.training.distributed import choose_device
    from metatokens.training.loading import open_model, open_tokenizer, questions_to

    config = questions_to(options.checkpoints[0], options.overrides)
    interventions = tuple(parse_intervention(text) for text in options.intervention)
    model = open_model(options.checkpoints[0])
    check_interventions(model, interventions)
    device = choose_device(config.device)
    if options.dry_run:
        plan = {"models": len(options.checkpoints), **config.model_dump(mode="json")}
        return _emit(options, plan, lambda: show_table("evaluate would ask", plan))
    rows = evaluate_recall(
        (open_model(path).to(device) for path in options.checkpoints),
        config,
        PieceEncoder(TextEncoder(open_tokenizer(options.checkpoints[0]))),
        interventions=interventions,
        progress=None if options.json else _say,
    )
    result = report(rows, config, [str(path) for path in options.checkpoints], model)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return _emit(options, result, lambda: show_recall(result))


def _sweep(options: argparse.Namespace) -> int:
    from metatokens.config.sweep import load_sweep

    sweep = load_sweep(options.file, options.overrides)
    from metatokens.report.requirements import FIGURE_PACKAGES, require
    from metatokens.report.tables import to_rich
    from metatokens.sweep.planning import describe_plan, plan_sweep
    from metatokens.sweep.running import make_slots, parse_gpus
    from metatokens.sweep.writing import run_and_write

    slots = make_slots(options.jobs, parse_gpus(options.gpus))
    if options.figures:
        require("--figures", FIGURE_PACKAGES)
    runs = plan_sweep(sweep, options.out, str(options.file))
    if options.dry_run:
        plan = describe_plan(sweep, runs)
        return _emit(options, plan, lambda: show_rows(f"sweep would run, {plan['matching']}", plan["runs"]))
    results = run_and_write(sweep, runs, options.out, slots, figures=options.figures)
    from rich.console import Console

    _emit(options, results, lambda: Console().print(*to_rich(results)))
    for failure in results.failed:
        _say(f"metatokens: {failure.run}: {failure.error}")
    return int(bool(results.failed))


def _perplexity(options: argparse.Namespace) -> int:
    from metatokens.data.sources import SourceOptions, iterate_documents
    from metatokens.evaluation.interventions import check_interventions, parse_intervention
    from metatokens.evaluation.perplexity import PerplexityOptions, TokenScorer, measure_perplexity
    from metatokens.training.loading import open_model, open_tokenizer

    interventions = tuple(parse_intervention(text) for text in options.intervention)
    model, tokenizer = open_model(options.checkpoint), open_tokenizer(options.checkpoint)
    check_interventions(model, interventions)
    injection = _injection(options.injection, options.ratio)
    measured = PerplexityOptions(
        window=options.window or _whole_window(model),
        window_unit=options.window_unit if options.window else "positions",
        stride=options.stride,
        injection=injection,
        interventions=interventions,
        seed=options.seed,
        max_tokens_per_document=options.max_tokens,
        batch_size=options.batch_size,
    )
    documents = (
        (d.source, d.text) for d in iterate_documents(options.text, SourceOptions(max_documents=options.max_documents))
    )
    if options.dry_run:
        TokenScorer(model, tokenizer, measured)  # its checks are those of the measurement
        names = [name for name, _ in documents]
        rows = {"documents": len(names), "window": measured.window, "injection": options.injection}
        rows["interventions"] = options.intervention or None
        return _emit(options, rows, lambda: show_table("perplexity would score", rows))
    result = measure_perplexity(model, documents, tokenizer, measured)
    return _emit(options, result, lambda: show_perplexity(result))


def _whole_window(model: Any) -> int:
    from metatokens.generation.decoding import sequence_limit

    limit = sequence_limit(model)
    if limit is None:
        raise UsageError("--window", expected="a length", found="none, and a model without a limit", remedy="set it")
    return limit


def _analyze(options: argparse.Namespace) -> int:
    from metatokens.analysis.pipeline import Identity, analyze
    from metatokens.analysis.results import write_results
    from metatokens.analysis.subjects import check_model
    from metatokens.data.sources import source_files
    from metatokens.training.loading import analysis_of, model_folder, open_model, open_tokenizer
    from metatokens.training.starting import model_sha256

    config = analysis_of(options.checkpoint, options.text, options.overrides)
    if options.out.exists() and not options.out.is_dir():
        raise UsageError("--out", expected="a folder", found=f"a file {options.out}", remedy="name another")
    model, tokenizer = open_model(options.checkpoint), open_tokenizer(options.checkpoint)
    check_model(model)
    if options.text is not None:
        source_files(options.text)
    if options.dry_run:
        plan = {"out": str(options.out), **config.model_dump(mode="json")}
        return _emit(options, plan, lambda: show_table("analyze would measure", plan))
    text = ["--text", options.text] if options.text else []
    words = ["metatokens", "analyze", str(options.checkpoint), *text, "--out", str(options.out), *options.overrides]
    identity = Identity(
        name="/".join(options.checkpoint.absolute().parts[-2:]),
        weights_sha256=model_sha256(model_folder(options.checkpoint)),
        command=shlex.join(words),
    )
    results, arrays = analyze(model, tokenizer, config, identity=identity, say=_say)
    write_results(options.out, results, arrays)
    return _emit(options, results.model_dump(mode="json"), lambda: show_verdicts(results))


def _report(options: argparse.Namespace) -> int:
    from metatokens.report.requirements import PAGE_PACKAGES, require

    require("report", PAGE_PACKAGES)
    from metatokens.report.page import write_report

    page = write_report(options.results, options.out)
    return _emit(options, {"page": str(page)}, lambda: print(page))


def _generate(options: argparse.Namespace) -> int:
    from metatokens.generation.decoding import NoSchedule, PeriodicSchedule, UniformSchedule, generate_text
    from metatokens.training.loading import open_model, open_tokenizer

    model, tokenizer = open_model(options.checkpoint), open_tokenizer(options.checkpoint)
    schedules: dict[str, Callable[[], Any]] = {
        "none": NoSchedule,
        "periodic": lambda: PeriodicSchedule(text_tokens=options.every),
        "uniform": lambda: UniformSchedule(ratio=options.ratio, seed=options.seed),
    }
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    unseen = iter([prompt])  # shown with the first piece, when nothing refuses it any more
    stream = None if options.json else lambda text: print(next(unseen, "") + text, end="", flush=True)
    result = generate_text(
        model,
        tokenizer,
        prompt,
        schedule=schedules[options.schedule](),
        max_text_tokens=options.max_text_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stream=stream,
        show_meta=options.show_meta,
    )
    return _emit(options, result, lambda: print(next(unseen, "")))


def _info(options: argparse.Namespace) -> int:
    from metatokens.config.loading import preset_names

    if options.presets or options.model is None:
        names = preset_names()
        return _emit(options, {"presets": names}, lambda: print("\n".join(names)))
    from metatokens.baselines.building import build_config
    from metatokens.baselines.pretrained import PretrainedCausalLM
    from metatokens.config.finetuning import FinetuneConfig, FreshStart
    from metatokens.config.loading import differences_from_paper, is_finetuning, load_preset
    from metatokens.config.schema import PretrainConfig
    from metatokens.evaluation.speed import describe_model, describe_pretrained
    from metatokens.training.loading import open_model, pretraining_of

    folder = Path(options.model)
    vocab_size = options.text_vocab_size
    run: PretrainConfig | None = None
    if folder.is_dir():
        model = open_model(folder)
        if isinstance(model, PretrainedCausalLM):
            result = describe_pretrained(model)
            return _emit(options, result, lambda: show_table(options.model, result))
        config, run = model.config, pretraining_of(folder)
    elif is_finetuning(options.model):
        start = load_preset(options.model, schema=FinetuneConfig).start
        if not isinstance(start, FreshStart):
            raise UsageError(
                options.model,
                expected="a preset with a model of its own",
                found=f"one that starts from {start.path}",
                remedy="ask for that checkpoint",
            )
        config = build_config(start.model, text_vocab_size=vocab_size, eos_token_id=vocab_size - 1)
    else:
        run = load_preset(options.model)
        config = build_config(run.model, text_vocab_size=vocab_size, eos_token_id=vocab_size - 1)
    if run is None:
        result = describe_model(config)
    else:
        block_size = run.data.block_size
        result = describe_model(config, block_size=block_size, num_meta=run.injection.num_meta(block_size))
        result["differs_from_the_paper"] = differences_from_paper(run)
    return _emit(options, result, lambda: show_table(options.model, result))


if __name__ == "__main__":
    sys.exit(main())
