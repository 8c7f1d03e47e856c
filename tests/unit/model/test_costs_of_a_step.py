"""What a training step asks of the device beside its products: waits, copies and full-size tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metatokens.model import MetaTokenForCausalLM
from metatokens.model.meta_attention import _meta_tokens_first
from tiny_models import META, gradients, tiny_config, tiny_model, tokens
from watched import Watched

IDS = tokens("x_xx_x_xx", "xxxx___xx")
NUM_META = 3
INDICES = (IDS == META).nonzero()[:, 1].view(2, NUM_META)
# products, what has no other form, and what writes only some of the rows that it returns
NOT_COUNTED = {"addmm", "mm", "gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward", "index_add_"}


def step(model: MetaTokenForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    loss: Tensor = model(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss


def steps(given: str) -> tuple[Watched, MetaTokenForCausalLM]:
    """Take a step on a device whose values cannot be seen, and return what was asked of it."""
    model = MetaTokenForCausalLM(tiny_config()).train().to("meta")
    model._has_checked_labels = True  # as after the first step, which looks at the labels once
    ids = IDS.to("meta")
    inputs = {
        "ids and labels": {},
        "a collator's batch": {
            "meta_indices": INDICES.to("meta"),
            "num_items_in_batch": torch.full((), 7.0, device="meta"),
        },
    }[given]
    with Watched(answer=NUM_META) as watched:
        step(model, ids, **inputs)
    return watched, model


@pytest.mark.parametrize(("given", "num_reads"), [("ids and labels", 1), ("a collator's batch", 0)])
def test_a_step_waits_for_the_device_only_to_count_the_meta_tokens(given: str, num_reads: int) -> None:
    watched, model = steps(given)
    assert (len(watched.reads), watched.copies) == (num_reads, [])
    # the count was used, and the backward pass was run
    assert ("mm", (2 * NUM_META, 32)) in watched.written
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_the_watch_sees_a_wait_and_a_copy() -> None:
    there = torch.zeros(2, device="meta")
    with Watched(answer=5) as watched:
        assert int(there.sum()) == 5
        assert there.long().tolist() == [5, 5]
        torch.arange(2).to("meta")
    assert (len(watched.reads), len(watched.copies)) == (2, 1)


def written_by_a_step(num_layers: int, ids: Tensor) -> int:
    model = tiny_model(num_hidden_layers=num_layers).train()
    with Watched() as watched:
        step(model, ids)
    return sum(
        count * torch.Size(shape).numel()
        for (name, shape), count in watched.written.items()
        if name not in NOT_COUNTED and "attention" not in name
    )


def test_a_block_writes_few_tensors_of_all_positions_beside_its_products() -> None:
    ids = tokens(*["x" * 15 + "_" + "x" * 48] * 16)
    written = written_by_a_step(3, ids) - written_by_a_step(2, ids)
    # 8 rotate queries and keys both ways, 2 are sums forward and 4 backward, 1 is the gradient with that of the meta
    # rows; meta-attention itself has a sixty-fourth of the positions
    assert 15 < written / (ids.numel() * 32) < 15.5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_meta_tokens_first_is_a_stable_sort(share: float) -> None:
    is_meta = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < share
    expected = (~is_meta).to(torch.int8).argsort(dim=-1, stable=True)
    assert torch.equal(_meta_tokens_first(is_meta, is_meta.cumsum(-1)), expected)
