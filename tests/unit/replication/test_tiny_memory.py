"""experiments/tiny-memory compares what it says: equal columns, and a span that no window can relay to its copy."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metatokens.config.finetuning import FinetuneConfig, FreshStart
from metatokens.config.sweep import expand, load_sweep
from metatokens.model.memory import MemoryPolicy, count_tokens, describe_tokens, see, stay
from metatokens.replication.plan import load_scale
from metatokens.tasks.words import ITEMS
from metatokens.training.finetuning import build_on_meta_device, training_batches

FILES = Path(__file__).parents[3] / "experiments" / "tiny-memory"


def arms() -> dict[str, FinetuneConfig]:
    load_scale(str(FILES))  # and nothing has changed since its first run
    configs: dict[str, FinetuneConfig] = {}
    for name in ("copying", "narrower"):
        for point in expand(load_sweep(FILES / f"{name}.yaml"), name):
            assert isinstance(point.config, FinetuneConfig)
            configs[point.labels["arm"]] = point.config
    return configs


def first_instance(config: FinetuneConfig) -> tuple[torch.Tensor, list[str], MemoryPolicy]:
    """Return which of its tokens are meta-tokens, their texts, and who sees whom."""
    model, tokenizer = build_on_meta_device(config)
    ids = torch.from_numpy(training_batches(config, model, tokenizer).batch_at(0).input_ids)[:1].long()
    assert isinstance(config.start, FreshStart)
    memory: Any = config.start.model.attention
    policy = MemoryPolicy.read(memory.to_hf()["memory"] if memory.kind == "memory" else {"window": len(ids[0])})
    return ids == model.config.meta_token_id, [tokenizer.decode([int(one)]).strip() for one in ids[0]], policy


@pytest.mark.parametrize("arm", ["window", "sinks", "same-cache", "every", "pause", "meta", "full"])
def test_only_arms_that_remember_can_carry_a_word_to_its_copy_and_at_equal_columns(arm: str) -> None:
    config = arms()[arm]
    is_meta, words, policy = first_instance(config)
    columns = describe_tokens(policy, is_meta)
    sees = see(policy, columns, columns)[0].float()
    assert isinstance(config.start, FreshStart)
    reach = torch.linalg.matrix_power(sees, config.start.model.num_hidden_layers) > 0
    span = [place for place, word in enumerate(words[: words.index("]")]) if word in ITEMS]
    colon = len(words) - 1 - words[::-1].index(":")
    assert len(span) == 16
    carried = [bool(reach[colon + number, place]) for number, place in enumerate(span)]
    assert carried == [arm in ("every", "pause", "meta", "full")] * 16
    before = columns.part(0, colon + 1)
    kept = int(stay(policy, before, count_tokens(before)).sum())
    # the window of a policy holds one token more than a query needs of the past
    assert kept == {"window": 4, "sinks": 8, "full": colon + 1}.get(arm, 18)
