"""`metatokens info`: what a model costs."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatokens.cli.arguments import add_verb, at_least
from metatokens.cli.output import announce, emit
from metatokens.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "parameters, operations per token, memory, and what differs from the paper"
    parser = add_verb(verbs, "info", _run, text)
    parser.add_argument("model", nargs="?", help="preset, YAML file, or model, checkpoint or run folder")
    parser.add_argument(
        "--text-vocab-size", type=at_least(1), default=50_257, help="size of the text vocabulary, for a preset"
    )
    parser.add_argument("--presets", action="store_true", help="list the presets")


def _run(options: argparse.Namespace) -> int:
    from metatokens.report.console import show_presets, show_table

    if options.presets or options.model is None:
        announce(options, "counting the parameters of every preset")
        from metatokens.evaluation.presets import describe_presets

        presets = describe_presets(options.text_vocab_size)
        following = ("metatokens", "info", "tiny/meta")
        listed = {"presets": [asdict(preset) for preset in presets]}
        return emit(
            options, listed, lambda: show_presets(presets, text_vocab_size=options.text_vocab_size), following=following
        )
    from metatokens.config.loading import differences_from_paper, load_preset, verb_of
    from metatokens.training.loading import ModelFolder

    folder, verb = Path(options.model), ""
    if folder.is_dir():
        ModelFolder(folder).check_path()
    else:
        verb = verb_of(options.model)  # refuses a wrong name before the slow imports
    announce(options, f"looking at {options.model}")
    from metatokens.baselines.building import build_config
    from metatokens.baselines.pretrained import PretrainedCausalLM
    from metatokens.config.finetuning import FinetuneConfig, FreshStart
    from metatokens.config.schema import PretrainConfig
    from metatokens.evaluation.speed import describe_model, describe_pretrained

    vocab_size = options.text_vocab_size
    run: PretrainConfig | None = None
    if folder.is_dir():
        opened = ModelFolder(folder)
        model = opened.open_model()
        if isinstance(model, PretrainedCausalLM):
            result = describe_pretrained(model)
            return emit(options, result, lambda: show_table(options.model, result))
        config, run = model.config, opened.pretraining
    elif verb == "graft":
        raise UsageError(
            options.model,
            expected="a preset with a model of its own",
            found="one that grafts a trained model",
            remedy=f"write `metatokens graft BASE --preset {options.model} --dry-run`",
        )
    elif verb == "finetune":
        start = load_preset(options.model, schema=FinetuneConfig).start
        if not isinstance(start, FreshStart):
            raise UsageError(
                options.model,
                expected="a preset with a model of its own",
                found=f"one that starts from {start.path}",
                remedy=f"write `metatokens info {start.path}`",
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
    return emit(options, result, lambda: show_table(options.model, result))
