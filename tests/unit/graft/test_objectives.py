"""What the new parts of a graft learn from: objectives against their slow definitions, and their gradients."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from grafted_models import CONFIG, LENGTH, META, ids, largest, make, plain, trained
from metatokens.config.grafting import Objectives
from metatokens.errors import UsageError
from metatokens.graft import GraftConfig, enable_gradient_checkpointing, graft
from metatokens.graft.objectives import OBJECTIVES
from metatokens.graft.student import Student
from metatokens.model.compatibility import checkpoint_blocks

TEXT, SAMPLED = ids(rows=2, length=LENGTH), torch.tensor([[3, 17, 30], [8, 9, 39]])
ANSWERS = torch.full_like(TEXT, -100)
ANSWERS[0, -4:] = TEXT[0, -4:]  # the other row asks nothing


NO_DROPOUT = {"gpt2": {"embd_pdrop": 0, "resid_pdrop": 0, "attn_pdrop": 0}}


def student(family: str = "llama", config: GraftConfig = CONFIG, **objectives: float) -> Student:
    return Student(trained(family, config, **NO_DROPOUT.get(family, {})), Objectives(**objectives), {}).train()


def test_every_objective_has_a_weight_and_a_weight_its_objective() -> None:
    assert Objectives.model_fields.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_objectives_are_their_definitions(family: str) -> None:
    text, following = TEXT[:, :-1], TEXT[:, 1:]
    with torch.no_grad():
        own, full = (model(text, use_cache=False).logits for model in (trained(family), plain(family)))
    log_own, log_full = log_softmax(own, -1), log_softmax(full, -1)
    divergences = (log_full.exp() * (log_full - log_own)).sum(-1)
    mean_of_drawn = divergences.gather(1, SAMPLED).mean()
    outcome = student(family, distillation=0.5, language_model=2)(text, following, SAMPLED, num_items_in_batch=7)
    expected = {
        "distillation": mean_of_drawn * text.numel(),
        "language_model": cross_entropy(own.flatten(0, 1), following.flatten(), reduction="sum"),
    }
    assert outcome.parts.keys() == expected.keys()
    for name, value in expected.items():
        assert largest(outcome.parts[name] - value) < 1e-9 * largest(value), name
    total = 0.5 * expected["distillation"] + 2 * expected["language_model"]
    assert largest(outcome.loss - total / 7) < 1e-9
    # the mean over an answer counts as often as there are positions
    asked = student(family, distillation=0, language_model=0, needles=3)(
        text, following, SAMPLED, ANSWERS[:, 1:], num_items_in_batch=7
    )
    mean = cross_entropy(own[0, -4:], following[0, -4:])
    assert asked.parts.keys() == {"needles"}
    assert largest(asked.loss - 3 * mean * text.shape[1] / 7) < 1e-9


def test_a_micro_batch_without_a_question_has_a_gradient_of_nought() -> None:
    model = student(distillation=0, language_model=0)
    outcome = model(TEXT, TEXT, SAMPLED, torch.full_like(TEXT, -100))
    outcome.loss.backward()
    assert outcome.loss == 0
    assert largest(model.wrapped.metatokens_graft.row.grad) == 0


def test_all_positions_would_give_the_whole_divergence_and_a_chunk_at_a_time_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for elements in (2**23, 3 * 40):  # at once, and three rows of logits at a time
        monkeypatch.setattr("metatokens.graft.objectives.distillation.LOGITS_CHUNK_ELEMENTS", elements)
        model = student(language_model=0)
        loss = model(TEXT, TEXT, torch.arange(LENGTH).expand(2, -1)).loss
        loss.backward()
        results.append((loss, model.wrapped.metatokens_graft.row.grad))
    assert largest(results[0][0]) > 1
    for one, other in zip(*results, strict=True):
        assert largest(one - other) < 1e-9


def test_in_training_only_what_has_a_weight_is_computed_and_in_evaluation_all() -> None:
    model = student(distillation=0)
    assert model(TEXT, TEXT, SAMPLED).parts.keys() == {"language_model"}
    outcome = model.eval()(TEXT, TEXT, SAMPLED, ANSWERS)
    assert outcome.parts.keys() == OBJECTIVES.keys()
    assert outcome.loss == outcome.parts["language_model"] + outcome.parts["needles"]
    # the teacher has left the model as it was
    assert not model.wrapped.training
    assert model.wrapped.metatokens_graft.is_on


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", CONFIG),
        ("gpt2", CONFIG),
        ("gpt_neo", CONFIG),
        ("llama", replace(CONFIG, positions="compact")),
        ("llama", META),
        ("gpt_neo", META),
    ],
)
@pytest.mark.parametrize("length", [LENGTH, 200])  # by one mask, and by a plan of chunks
def test_blocks_that_are_computed_again_in_the_backward_pass_give_the_same_gradients(
    family: str, config: GraftConfig, length: int
) -> None:
    if family == "gpt_neo" and length > LENGTH:
        return  # it has no more positions, and no plan
    text, results = ids(rows=2, length=length), []
    for again in (False, True):
        model = student(family, config)
        if again:
            model.gradient_checkpointing_enable()
        runs, attention = [], model.wrapped.config._attn_implementation
        _, matrix = next(model.wrapped.metatokens_graft.family.matrices_of(model.wrapped.base_model))
        matrix.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(text, text, SAMPLED).loss.backward()
        assert len(runs) == (3 if again else 2)  # the teacher's, the model's, and that of the backward pass
        assert model.wrapped.config._attn_implementation == attention
        assert model.wrapped.metatokens_graft.spread is None
        results.append(torch.cat([p.grad.flatten() for p in model.wrapped.metatokens_graft.parameters()]))
    assert largest(results[0]) > 1e-3
    assert largest(results[0] - results[1]) < 1e-9


def test_the_models_own_checkpointing_is_refused_since_its_blocks_would_forget_the_anchors() -> None:
    model = graft(make("llama"), CONFIG).train()
    checkpoint_blocks(model, {"use_reentrant": False})
    with pytest.raises(UsageError, match="enable_gradient_checkpointing"):
        model(TEXT, use_cache=False)
    enable_gradient_checkpointing(model)
    assert model(TEXT, use_cache=False).logits.shape[1] == LENGTH
