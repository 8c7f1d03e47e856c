"""`metatokens analyze`: look inside a model."""

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_overrides, add_verb
from metatokens.cli.output import announce, emit
from metatokens.cli.reading import Progress
from metatokens.errors import redact


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = (
        "look inside a model: attention, cause, compression, with intervals and a verdict on each claim of the paper; "
        "continues behind the last measure that it finished"
    )
    parser = add_verb(verbs, "analyze", _run, text, long=True)
    parser.add_argument("checkpoint", type=Path, help="model, checkpoint or run folder")
    parser.add_argument(
        "--text", help="a source, as for `prepare` (default: instances of the run's recall task; a graft needs one)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and arrays.npz")
    add_overrides(parser, "metatokens.config.analysis:AnalysisConfig")


def _run(options: argparse.Namespace) -> int:
    from metatokens.analysis.results import ARRAYS_NAME, RESULTS_NAME, write_results
    from metatokens.data.sources import source_files
    from metatokens.report.console import show_table, show_verdicts
    from metatokens.storage import check_file, keep_elsewhere
    from metatokens.training.loading import ModelFolder, analysis_config_of

    folder = ModelFolder(options.checkpoint)
    folder.check_path()
    if options.text is not None:
        source_files(options.text)
    for name in (ARRAYS_NAME, RESULTS_NAME):
        check_file(options.out / name)
    announce(options, f"opening {options.checkpoint}")
    config = analysis_config_of(folder, options.text, options.overrides)  # asks a model without a run for its window
    from metatokens.analysis.inputs.subject import check_model
    from metatokens.analysis.kept import KEPT_NAME
    from metatokens.analysis.run import Identity, analyze

    # sums of components and entropies need float32, whatever the dtype of the weights
    model, tokenizer = folder.open_model().float(), folder.tokenizer
    if not folder.is_grafted:
        check_model(model)
    if options.dry_run:
        plan = {"out": str(options.out), **config.model_dump(mode="json")}
        return emit(options, plan, lambda: show_table("analyze would measure", plan))
    text = ["--text", options.text] if options.text else []
    words = ["metatokens", "analyze", str(options.checkpoint), *text, "--out", str(options.out), *options.overrides]
    identity = Identity(
        name="/".join(options.checkpoint.absolute().parts[-2:]),
        weights_sha256=folder.sha256,
        command=redact(shlex.join(words)),
    )
    progress, kept = Progress(), options.out / KEPT_NAME
    try:
        results, arrays = analyze(
            model, tokenizer, config, identity=identity, say=progress.say, progress=progress.show, keep=kept
        )
    finally:
        progress.close()
    try:
        keep_elsewhere(options.out, lambda out: write_results(out, results, arrays))
        shutil.rmtree(kept, ignore_errors=True)
    finally:
        following = ("metatokens", "report", options.out)
        emit(options, results.model_dump(mode="json"), lambda: show_verdicts(results), following=following)
    return 0
