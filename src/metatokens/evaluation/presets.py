"""What each preset of the package is for, how large its model is and what its run costs."""

from dataclasses import dataclass

from metatokens.baselines.building import build_config
from metatokens.config.finetuning import FinetuneConfig, FreshStart
from metatokens.config.grafting import GraftRunConfig
from metatokens.config.loading import load_preset, preset_names, preset_purpose, verb_of
from metatokens.config.schema import ModelConfig
from metatokens.model import MetaTokenConfig
from metatokens.model.accounting import count_parameters, training_flops


@dataclass(frozen=True)
class PresetDescription:
    """A preset in a line."""

    name: str
    purpose: str
    parameters: int | None
    """None if the run starts from a trained model, whose size it takes."""
    steps: int
    text_tokens: int | None
    """Text tokens of the whole run; None for a recall task, whose prompts have no fixed length."""
    training_flops: float | None


def describe_presets(text_vocab_size: int) -> list[PresetDescription]:
    """Describe every preset of the package; a model is counted with this text vocabulary."""
    return [_describe(name, text_vocab_size) for name in preset_names()]


def _describe(name: str, text_vocab_size: int) -> PresetDescription:
    purpose, verb = preset_purpose(name), verb_of(name)
    if verb == "graft":
        graft = load_preset(name, schema=GraftRunConfig)
        blocks = graft.total_steps * graft.training.batch_blocks
        return PresetDescription(name, purpose, None, graft.total_steps, blocks * graft.data.block_size, None)
    if verb == "finetune":
        run = load_preset(name, schema=FinetuneConfig)
        fresh = run.start.model if isinstance(run.start, FreshStart) else None
        parameters = None if fresh is None else count_parameters(_build(fresh, text_vocab_size)).total
        return PresetDescription(name, purpose, parameters, run.total_steps, None, None)
    config = load_preset(name)
    model, blocks = _build(config.model, text_vocab_size), config.total_steps * config.training.batch_blocks
    num_meta = config.injection.num_meta(config.data.block_size)
    return PresetDescription(
        name,
        purpose,
        count_parameters(model).total,
        config.total_steps,
        blocks * config.text_tokens_per_block,
        float(blocks * training_flops(model, num_positions=config.data.block_size, num_meta=num_meta)),
    )


def _build(model: ModelConfig, text_vocab_size: int) -> MetaTokenConfig:
    return build_config(model, text_vocab_size=text_vocab_size, eos_token_id=text_vocab_size - 1)
