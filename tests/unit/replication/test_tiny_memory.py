"""experiments/tiny-memory compares what it says: equal columns, and a span that no window can relay to its copy."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metatokens.config.finetuning import FinetuneConfig, FreshStart
from metatokens.config.schema import PretrainConfig
from metatokens.config.sweep import expand, load_sweep
from metatokens.model.accounting import cache_bytes
from metatokens.model.memory import MemoryPolicy, count_tokens, describe_tokens, see, stay
from metatokens.replication.plan import load_scale
from metatokens.tasks.words import ITEMS
from metatokens.training.finetuning import build_on_meta_device, training_batches
from metatokens.training.initialization import build_model_on_meta_device

FILES = Path(__file__).parents[3] / "experiments" / "tiny-memory"


def arms() -> dict[str, FinetuneConfig]:
    load_scale(str(FILES))  # and nothing has changed since its first run
    configs: dict[str, FinetuneConfig] = {}
    for name in ("copying", "narrower", "controls"):
        for point in expand(load_sweep(FILES / f"{name}.yaml"), name):
            assert isinstance(point.config, FinetuneConfig)
            arm = point.labels["arm"]
            assert configs.get(arm, point.config) == point.config
            configs[arm] = point.config
    return configs


def first_instance(config: FinetuneConfig) -> tuple[torch.Tensor, list[str], MemoryPolicy]:
    """Return which of its tokens are meta-tokens, their texts, and who sees whom."""
    model, tokenizer = build_on_meta_device(config)
    ids = torch.from_numpy(training_batches(config, model, tokenizer).batch_at(0).input_ids)[:1].long()
    assert isinstance(config.start, FreshStart)
    memory: Any = config.start.model.attention
    policy = MemoryPolicy.read(memory.to_hf()["memory"] if memory.kind == "memory" else {"window": len(ids[0])})
    return ids == model.config.meta_token_id, [tokenizer.decode([int(one)]).strip() for one in ids[0]], policy


def bytes_when_asked(config: FinetuneConfig) -> int:
    is_meta, words, _ = first_instance(config)
    colon = len(words) - words[::-1].index(":")
    model, _ = build_on_meta_device(config)
    return cache_bytes(model.config, num_positions=colon, num_meta=int(is_meta.sum())).total


def test_meta_attention_and_means_are_compared_with_pause_at_equal_bytes() -> None:
    configs = arms()
    pause = bytes_when_asked(configs["pause"])
    assert bytes_when_asked(configs["meta-equal-bytes"]) == bytes_when_asked(configs["pooled"]) == pause
    assert bytes_when_asked(configs["meta"]) > pause


def test_arms_on_books_read_the_same_text_and_hold_what_they_say_at_its_end() -> None:
    of_pause = 2 * 4 * 64 * 4  # a column: keys and values of four layers of width 64, in float32
    expected = dict.fromkeys(("pause", "every", "same-cache", "meta-equal-bytes", "pooled"), 68)
    expected |= {"window": 32, "sinks": 36, "meta": 100, "full": 256}
    found = {}
    for point in expand(load_sweep(FILES / "books.yaml"), "books"):
        config = point.config
        assert isinstance(config, PretrainConfig)
        num_positions = config.data.block_size
        num_meta = config.injection.num_meta(num_positions)
        assert num_positions - num_meta == 256
        model = build_model_on_meta_device(config.model, text_vocab_size=4096, eos_token_id=0)
        held = cache_bytes(model.config, num_positions=num_positions, num_meta=num_meta)
        found[point.labels["arm"]] = held.total / of_pause
    assert found == expected


@pytest.mark.parametrize(
    "arm", ["window", "sinks", "same-cache", "every", "pause", "meta", "full", "meta-equal-bytes", "pooled"]
)
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
    assert carried == [arm not in ("window", "sinks", "same-cache")] * 16
    before = columns.part(0, colon + 1)
    kept = int(stay(policy, before, count_tokens(before)).sum())
    # the window of a policy holds one token more than a query needs of the past
    assert kept == {"window": 4, "sinks": 8, "full": colon + 1, "meta-equal-bytes": 13}.get(arm, 18)
