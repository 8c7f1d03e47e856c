"""`metatokens perplexity`: windowed perplexity on text."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_interventions, add_verb, at_least, share
from metatokens.cli.output import announce, emit
from metatokens.cli.reading import Progress, add_source_options, source_options


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "perplexity", _run, "windowed perplexity of a model on text", long=True)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument("text", help="a source, as for `prepare`; each document is scored on its own")
    parser.add_argument("--window", type=at_least(1), help="length of a window (default: all positions of the model)")
    parser.add_argument(
        "--window-unit", choices=("text", "positions"), default="text", help="whether meta-tokens count in the window"
    )
    parser.add_argument(
        "--stride",
        type=at_least(1),
        help="text tokens by which a sliding window moves (default: 256, at most half a window)",
    )
    parser.add_argument(
        "--injection", choices=("none", "periodic", "uniform"), default="none", help="meta-tokens at evaluation"
    )
    parser.add_argument("--ratio", type=share, default=0.1, help="share of positions that are meta-tokens")
    parser.add_argument(
        "--extrapolate", action="store_true", help="allow windows beyond the model's, if its positions have no end"
    )
    add_interventions(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the uniform injection")
    parser.add_argument(
        "--max-tokens", type=at_least(1), help="score only this many text tokens at the start of each document"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="windows in one forward pass")
    add_source_options(parser)


def _run(options: argparse.Namespace) -> int:
    from metatokens.data.sources import iterate_documents, source_files
    from metatokens.report.console import show_perplexity, show_table
    from metatokens.training.loading import ModelFolder

    folder = ModelFolder(options.checkpoint)
    folder.check_path()
    source_files(options.text)  # warns of files that are left out
    announce(options, f"opening {options.checkpoint}")
    from metatokens.evaluation.interventions import check_interventions, parse_intervention
    from metatokens.evaluation.perplexity import measure_perplexity
    from metatokens.evaluation.scoring import TokenScorer
    from metatokens.evaluation.windows import PerplexityOptions

    interventions = tuple(parse_intervention(text) for text in options.intervention)
    model, tokenizer = folder.open_model(), folder.tokenizer
    check_interventions(model, interventions)
    injection = _injection(options.injection, options.ratio)
    measured = PerplexityOptions(
        window=options.window,
        window_unit=options.window_unit,
        stride=options.stride,
        extrapolate=options.extrapolate,
        injection=injection,
        interventions=interventions,
        seed=options.seed,
        max_tokens_per_document=options.max_tokens,
        batch_size=options.batch_size,
    )
    progress = Progress()
    documents = _documents(iterate_documents(options.text, source_options(options)), progress)
    if options.dry_run:
        scorer = TokenScorer(model, tokenizer, measured)  # makes the checks of the measurement
        names = [name for name, _ in documents]
        rows = {"documents": len(names), "window": scorer.options.window, "injection": options.injection}
        rows["interventions"] = options.intervention or None
        return emit(options, rows, lambda: show_table("perplexity would score", rows))
    try:
        result = measure_perplexity(
            model,
            documents,
            tokenizer,
            measured,
            progress=lambda done, total: progress.show(f"read {done:,} of {total:,} text tokens", done / total),
        )
    finally:
        progress.close()
    following = ("metatokens", "generate", options.checkpoint, "Once upon a time", "--show-meta")
    return emit(options, result, lambda: show_perplexity(result), following=following)


def _documents(documents: Iterable[Any], progress: Progress) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of documents, and show how many have been read."""
    for number, document in enumerate(documents, start=1):
        progress.show(f"encoding document {number:,}, {document.source}")
        yield document.source, document.text


def _injection(kind: str, ratio: float) -> Any:
    from metatokens.config.schema import NoInjection, PeriodicInjection, UniformInjection

    if kind == "none":
        return NoInjection()
    return {"periodic": PeriodicInjection, "uniform": UniformInjection}[kind](ratio=ratio)
