"""Length extension: it scales the RoPE of a trained model and plans the short training that the new window needs.

That training is pre-training that starts from the model's weights, so `metatokens.training.pretraining` runs it. The
paper's appendix gives YaRN's parameters.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatokens.config.extension import ExtensionMethod, extend_model, extension_config
from metatokens.config.schema import PretrainConfig
from metatokens.data.tokenizer import build_hf_tokenizer
from metatokens.errors import UsageError
from metatokens.generation.decoding import schedule_for
from metatokens.model.export import save_model
from metatokens.model.schedule import state_schedule
from metatokens.storage import LEAST_BYTES, check_folder, new_folder
from metatokens.training.checkpoint import write_manifest
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder
from metatokens.training.model_card import Training, write_model_card
from metatokens.training.starting import load_start

_BYTES_PER_PARAMETER = 4  # models are saved in float32


def plan_extension(
    checkpoint: Path, *, method: ExtensionMethod, factor: float, preset: str, overrides: Sequence[str] = ()
) -> PretrainConfig:
    """Return the config that continues the training of a model with a window `factor` times as long.

    If `checkpoint` lies in the folder of its pre-training run, meta-tokens are injected as in that run, else as
    `preset` says.

    Raises:
        UsageError, CheckpointError: see `extend_model`, `extension_config` and `ModelFolder.shape`.
    """
    folder = ModelFolder(checkpoint)
    model, run = extend_model(folder.shape, method, factor), folder.pretraining
    return extension_config(
        preset,
        start_from=checkpoint,
        model=model,
        injection=run.injection if run else None,
        overrides=overrides,
    )


def describe_extension(config: PretrainConfig) -> dict[str, Any]:
    """Return the facts about an extension that `metatokens extend` reports besides its training."""
    return {
        "start_from": str(config.start_from),
        "rope_scaling": config.model.rope_scaling.model_dump(mode="json"),
        "window": config.model.max_sequence_length,
        "block_size": config.data.block_size,
        "injection": config.injection.model_dump(mode="json"),
    }


def write_untrained(config: PretrainConfig, out: Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Write the extended model, without any further training, into the new folder `out`; a dry run only checks.

    Raises:
        UsageError: if `out` exists or cannot be written.
        ResourceError: if the disk has no room for the model.
        CheckpointError: if the weights do not fit.
    """
    start = config.start_from
    assert start is not None
    folder = ModelFolder(start)
    hf = folder.config
    model = build_model(config.model, text_vocab_size=hf.meta_token_id, eos_token_id=hf.eos_token_id, seed=config.seed)
    state_schedule(model.generation_config, schedule_for(config.injection))
    sha256 = load_start(folder, model, config.model)
    if os.path.lexists(out):  # a broken link counts too
        raise UsageError(str(out), expected="a new folder", found="something there", remedy="choose another --out")
    check_folder(out, num_bytes=LEAST_BYTES + _BYTES_PER_PARAMETER * model.num_parameters())
    tokenizer = build_hf_tokenizer(folder.tokenizer)
    if not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as made:
            save_model(model, made, tokenizer)
            write_model_card(made, model, Training("extend", base_model=str(start)), name=out.name)
            write_manifest(made)
    return {
        "model": str(out),
        "num_parameters": model.num_parameters(),
        "start_sha256": sha256,
        **describe_extension(config),
    }
