"""Length extension: a trained model gets a longer window, and the short training that this window needs is planned.

RoPE is scaled; a model with xPos reads by blocks. The training is pre-training that starts from the model's weights, so
`metatokens.training.pretraining` runs it. The paper's appendix gives YaRN's parameters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatokens.config.extension import ExtensionMethod, extend_model, extension_config
from metatokens.config.schema import PretrainConfig
from metatokens.data.tokenizer import build_hf_tokenizer
from metatokens.generation.decoding import schedule_for
from metatokens.model.schedule import state_schedule
from metatokens.training.exporting import write_new_model
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder
from metatokens.training.model_card import Training
from metatokens.training.starting import load_start


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
        "attention": config.model.attention.kind,
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
    made = Training("extend", base_model=str(start))
    write_new_model(model, out, build_hf_tokenizer(folder.tokenizer), made=made, dry_run=dry_run)
    return {
        "model": str(out),
        "num_parameters": model.num_parameters(),
        "start_sha256": sha256,
        **describe_extension(config),
    }
