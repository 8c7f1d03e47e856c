"""Meta-attention of a graft: it is its definition, its cache changes nothing, and untrained it is not there."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grafted_models import (
    CONFIG,
    FAMILIES,
    LENGTH,
    META,
    TOLERANCES,
    by_definition,
    ids,
    largest,
    make,
    plain,
    read,
    trained,
)
from metatokens.config.grafting import Objectives
from metatokens.errors import UsageError
from metatokens.evaluation.eviction import POLICIES, Budget, Reader
from metatokens.graft import GraftConfig, graft, load_graft, save_graft, switched_off
from metatokens.graft.costs import cache_bytes
from metatokens.graft.student import Student

CONFIGS = {
    "evicted": META,
    "always": replace(META, reveal="always", num_sinks=0, window=4),
    "limited": replace(META, memory_limit=2),
    "every": replace(META, anchors="every"),
    "every, limited": replace(META, anchors="every", memory_limit=2),
}
SEQUENTIAL = [family for family in FAMILIES if family != "gpt_neox"]
# what the definition needs: a first block without positions; no mask of GPT-Neo's own, which counts columns
CHANGES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [0, 1]},
    "gpt_neo": {"attention_types": [[["global"], 2]], "max_position_embeddings": 64},
}
CHUNKS = ([17, 9, 8, *[1] * 7], [1] * LENGTH)


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "evicted") for family in SEQUENTIAL), *(("llama", name) for name in CONFIGS if name != "evicted")],
)
def test_forward_and_gradient_are_the_definition_and_so_is_the_cache(family: str, name: str) -> None:
    text, config, tolerance = ids(3), CONFIGS[name], TOLERANCES.get(family, 1e-10)
    changes = CHANGES.get(family, {})
    model, base = trained(family, config, **changes), make(family, **changes)
    names, new = zip(*model.metatokens_graft.named_parameters(), strict=True)
    expected = by_definition(base, model, text, config)
    logits = model(text, use_cache=False).logits
    assert largest(logits - expected) < tolerance
    with torch.no_grad():
        without = trained(family, replace(config, meta_attention=False), **changes)
        assert largest(without(text, use_cache=False).logits - expected) > 1e-3
    gradients = [torch.autograd.grad(of.square().sum(), new, materialize_grads=True) for of in (logits, expected)]
    for parameter, fast, slow in zip(names, *gradients, strict=True):
        assert largest(fast - slow) < tolerance * (1 + largest(slow)), parameter
        assert largest(slow) > 1e-6 or not parameter.startswith("meta_attn.0"), parameter
    for chunks in CHUNKS if family == "llama" else CHUNKS[:1]:
        assert largest(read(model, text, chunks) - expected) < tolerance


@pytest.mark.parametrize("family", SEQUENTIAL)
@torch.no_grad()
def test_without_training_a_graft_with_it_is_that_without_it_to_the_bit(family: str) -> None:
    text, model = ids(rows=2), graft(make(family), META)
    without = graft(make(family), CONFIG)
    assert torch.equal(model(text, use_cache=False).logits, without(text, use_cache=False).logits)
    assert torch.equal(read(model, text, CHUNKS[0]), read(without, text, CHUNKS[0]))
    with switched_off(model):
        assert torch.equal(model(text, use_cache=False).logits, plain(family)(text, use_cache=False).logits)


def test_beams_and_chunks_of_a_prompt_write_what_is_written_without_a_cache() -> None:
    model, text = trained("llama", CONFIGS["limited"]), ids(6, 20)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None, "num_beams": 4}
    options |= {"output_scores": True, "return_dict_in_generate": True, "num_return_sequences": 4}
    slow = model.generate(text, use_cache=False, **options)
    for chunk in (None, 6):
        fast = model.generate(text, prefill_chunk_size=chunk, **options)
        assert fast.sequences.tolist() == slow.sequences.tolist()
        assert largest(fast.sequences_scores - slow.sequences_scores) < 1e-6


def test_a_pass_of_several_chunks_of_queries_and_a_copy_of_the_model_give_the_same() -> None:
    text, model = ids(4, 300, rows=2), trained("llama", META)
    mask = torch.ones_like(text)
    mask[1, :50] = 0
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(text, attention_mask=mask, use_cache=False).logits
        for parameter in model.metatokens_graft.parameters():
            parameter.zero_()
    cached = read(twin, text, [140, 160], mask)
    assert largest((cached - expected)[mask.bool()]) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_of_the_cache_are_those_that_are_counted(name: str) -> None:
    model = trained("llama", CONFIGS[name])
    reader = Reader(model, POLICIES["full"], Budget(columns=14, length=LENGTH, sinks=2, window=6))
    for place in range(LENGTH):
        reader.read(ids()[:, place : place + 1])
        counted = cache_bytes(model, num_text=place + 1, bytes_per_number=8)
        held = [layer.meta_keys for layer in reader.cache.layers if layer.meta_keys is not None]
        assert counted.meta_attention == 2 * sum(keys.nbytes for keys in held)
        assert counted.total == reader.count_bytes()
        assert counted.total == reader.count_columns()[0] * 2 * 2 * 2 * 8 * 8
    assert counted.meta_attention > 0
    if CONFIGS[name].memory_limit:
        assert {layer.meta_keys.shape[2] for layer in reader.cache.layers} == {2}


def test_a_few_steps_of_training_move_its_output_from_zero_and_the_rest_of_it_behind() -> None:
    text = ids(rows=2, length=LENGTH + 1)
    student = Student(graft(make("llama"), META), Objectives(distillation=0), {}).train()
    own = dict(student.wrapped.metatokens_graft.meta_attn.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    assert all(largest(tensor) == 0 for name, tensor in before.items() if name.endswith("output"))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        outcome = student(text[:, :-1], text[:, 1:], torch.zeros(2, 1, dtype=torch.long), num_items_in_batch=2 * LENGTH)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        losses.append(outcome.loss.item())
    assert losses[-1] < losses[0]
    # in the last block it changes no anchor that another token sees
    changed = {name: largest(parameter - before[name]) for name, parameter in own.items() if name.startswith("0")}
    assert min(changed.values()) > 1e-3
    assert student.num_parameters() == sum(p.numel() for p in student.wrapped.metatokens_graft.parameters())


def test_it_is_saved_and_a_file_from_before_it_opens_without_it(tmp_path: Path) -> None:
    model = trained("llama", META, dtype=torch.float32)
    save_graft(model, tmp_path / "graft")
    with torch.no_grad():
        again = load_graft(tmp_path / "graft", make("llama", dtype=torch.float32))
        assert torch.equal(again(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)
    save_graft(trained("llama", CONFIG), tmp_path / "old")
    file = tmp_path / "old" / "graft.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    config = json.loads(header["config"])
    del config["meta_attention"]
    save_file(load_file(file), file, {**header, "config": json.dumps(config)})
    assert load_graft(tmp_path / "old", make("llama")).metatokens_graft.config == CONFIG


def test_parallel_blocks_and_compact_positions_are_refused_in_one_line() -> None:
    model = make("gpt_neox")
    with pytest.raises(UsageError, match=r"meta_attention.*llama.*found those of gpt_neox.*without meta_attention"):
        graft(model, META)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="meta_attention true needs positions"):
        GraftConfig(meta_attention=True, positions="compact")
