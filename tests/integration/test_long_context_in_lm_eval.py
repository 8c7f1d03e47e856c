"""The task files of lm-evaluation-harness give the figures of the long-context suite, text by text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import metatokens.evaluation.long_context as suite_package
from long_texts import write_books, write_stories
from metatokens.config.long_context import LongContextConfig
from metatokens.data.tokenizer import build_hf_tokenizer, train_tokenizer
from metatokens.evaluation.long_context.subject import Subject
from metatokens.evaluation.long_context.suite import evaluate_long_context
from metatokens.evaluation.long_context.tasks import TASKS
from metatokens.model.export import save_model
from metatokens.model.schedule import PeriodicSchedule, state_schedule
from tiny_models import randomize, tiny_model

FOLDER = Path(suite_package.__file__).parent / "lm_eval"
ANSWERS = (" bathroom", " hallway", " office")
LENGTH, INSTANCES = 700, 24


def test_every_task_of_the_suite_has_a_task_file() -> None:
    files = {path.stem for path in FOLDER.glob("[!_]*.yaml")}
    assert files == TASKS.keys()
    for name in files:
        task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert task["dataset_kwargs"] == {"task": name}
        assert task["task"] == f"long_context_{name.replace('-', '_')}"


def write_guessing_model(folder: Path, kind: str) -> Any:
    """Write a model that always says one of the answers, which one depends on the text; return it and its tokenizer."""
    tokenizer = train_tokenizer([" ".join(word.strip() for word in ANSWERS) + " " + "".join(ANSWERS)] * 9, 300)
    ids = [tokenizer.encode(answer).ids for answer in ANSWERS]
    assert [len(one) for one in ids] == [1, 1, 1]
    vocab_size = tokenizer.get_vocab_size()
    if kind == "hf":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = randomize(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size + 2, **shape)))
    else:
        model = tiny_model(
            dtype=torch.float32,
            vocab_size=vocab_size + 2,
            meta_token_id=vocab_size,
            pad_token_id=vocab_size + 1,
            max_position_embeddings=2048,
        )
        state_schedule(model.generation_config, PeriodicSchedule(4))
    with torch.no_grad():
        model.get_output_embeddings().weight[torch.tensor(ids)[:, 0]] *= 30
    if kind == "hf":
        model.save_pretrained(folder)
        build_hf_tokenizer(tokenizer).save_pretrained(folder)
    else:
        save_model(model, folder, build_hf_tokenizer(tokenizer))
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", ["hf", "metatokens"])
def test_the_harness_scores_every_text_as_the_suite_does(kind: str, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs metatokens[eval]")
    from lm_eval.tasks import TaskManager

    if kind == "metatokens":
        import metatokens.evaluation.harness  # noqa: F401 - registers the model

    books, babi = write_books(tmp_path / "books"), write_stories(tmp_path / "babi")
    model, tokenizer = write_guessing_model(tmp_path / "model", kind)
    config = LongContextConfig(
        tasks=("babilong-qa1", "passkey"), lengths=(LENGTH,), instances=INSTANCES, books=books, babi=babi, batch_size=3
    )
    ours = evaluate_long_context(Subject(model, tokenizer), config).rows
    given = {"length": LENGTH, "instances": INSTANCES, "books": str(books), "babi": str(babi)}
    name = str(tmp_path / "model")
    theirs = lm_eval.simple_evaluate(
        model=kind,
        model_args={"pretrained": name},
        tasks=["long_context_babilong_qa1", "long_context_passkey"],
        task_manager=TaskManager(include_path=str(FOLDER), metadata={"pretrained": name, **given}),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    for row, task in zip(ours, ("long_context_babilong_qa1", "long_context_passkey"), strict=True):
        samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
        assert [bool(sample["acc"]) for sample in samples] == list(row.right)
        assert theirs["results"][task]["acc,none"] == pytest.approx(row.accuracy.estimate)
    # a guess is right now and then: the figures are no mere zeros
    assert 0 < sum(ours[0].right) < INSTANCES
