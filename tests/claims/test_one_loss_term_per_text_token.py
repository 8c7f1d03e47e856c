"""No loss is paid for a meta-token (paper, section 3), and each text token is predicted exactly once.

The two paths to the loss differ in the ends of a block. Labels know only the block: its first text token is predicted
under `skip` if a meta-token stands before it, and nothing follows the last position. Injected blocks know the whole
text: the first text token was the last target of the block before, so it is no target here, and the last position
predicts the text token that follows. Where both describe the same terms, they give the same loss.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from metatokens.config.schema import LossPolicy, UniformInjection
from metatokens.data.collator import MetaTokenCollator
from metatokens.data.injection import InjectedBatch, inject_meta_tokens
from tiny_models import EOS, META, PAD, assert_close, attention_mask_of, tiny_model, tokens

POLICIES: tuple[LossPolicy, ...] = ("skip", "retarget")
PICTURES = ("xxxxxxx", "x_xx__x", "_x_xxx_", "___x_xx", "x______", "_______")
POSITIONS = ([1, 4, 5], [0, 2, 5], [0, 1, 2], [4, 5, 6])


def predicting_column(picture: str, column: int, policy: LossPolicy) -> int | None:
    """Return the column whose output predicts the token at `column`, or None if nothing does."""
    if policy == "skip":
        return column - 1 if column > 0 else None
    earlier = [j for j in range(column) if picture[j] == "x"]
    return earlier[-1] if earlier else None


def injected(positions: list[int], policy: LossPolicy, num_text: int = 4) -> tuple[np.ndarray, InjectedBatch]:
    text = np.random.default_rng(0).permutation(EOS)[None, : num_text + 1]
    return text, inject_meta_tokens(text, np.array([positions]), meta_token_id=META, loss_policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("picture", PICTURES)
def test_loss_from_labels_is_one_term_for_each_text_token_that_has_a_predecessor(
    picture: str, policy: LossPolicy
) -> None:
    model = tiny_model(loss_policy=policy, dtype=torch.float64)
    ids = tokens(picture)
    with torch.no_grad():
        output = model(ids, labels=ids, num_items_in_batch=1)
    log_probabilities = output.logits[0].log_softmax(-1)
    terms = []
    for column, kind in enumerate(picture):
        source = predicting_column(picture, column, policy)
        if kind == "x" and source is not None:
            terms.append(-log_probabilities[source, ids[0, column]])
    assert_close(output.loss, sum(terms, start=torch.zeros((), dtype=torch.float64)), 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("picture", PICTURES)
def test_default_loss_is_the_mean_over_its_terms(picture: str, policy: LossPolicy) -> None:
    model = tiny_model(loss_policy=policy, dtype=torch.float64)
    ids = tokens(picture)
    num_terms = sum(
        kind == "x" and predicting_column(picture, column, policy) is not None for column, kind in enumerate(picture)
    )
    with torch.no_grad():
        mean, total = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=1).loss
    assert_close(mean * max(num_terms, 1), total, 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_labels_at_meta_tokens_are_no_targets_whether_masked_or_not(policy: LossPolicy) -> None:
    model = tiny_model(loss_policy=policy)
    ids = tokens("x_xx__x")
    masked = ids.masked_fill(ids == META, -100)
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).loss, model(ids, labels=masked).loss)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_injected_targets_hold_every_text_token_but_the_first_exactly_once(
    positions: list[int], policy: LossPolicy
) -> None:
    text, batch = injected(positions, policy)
    targets = batch.targets[batch.targets != -100]
    assert sorted(targets.tolist()) == sorted(text[0, 1:].tolist())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_from_injected_targets_equals_loss_from_labels_of_the_same_terms(
    positions: list[int], policy: LossPolicy
) -> None:
    model = tiny_model(loss_policy=policy, dtype=torch.float64)
    text, batch = injected(positions, policy)
    ids = torch.from_numpy(batch.input_ids)
    # the block and the token that follows it, whose column changes nothing before it; the first text token is the
    # one target that labels would have and injected blocks have not
    whole = torch.cat([ids, torch.from_numpy(text[:, -1:])], dim=1)
    labels = whole.clone()
    labels[0, int((ids[0] != META).nonzero()[0])] = -100
    with torch.no_grad():
        from_targets = model(ids, shift_labels=torch.from_numpy(batch.targets)).loss
        from_labels = model(whole, labels=labels).loss
    assert_close(from_targets, from_labels, 1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
def test_first_text_token_is_a_target_of_labels_only_under_skip_and_after_a_meta_token(positions: list[int]) -> None:
    _, batch = injected(positions, "skip")
    ids = torch.from_numpy(batch.input_ids)
    only_first = torch.full_like(ids, -100)
    first = int((ids[0] != META).nonzero()[0])
    only_first[0, first] = ids[0, first]
    with torch.no_grad():
        assert (tiny_model(loss_policy="skip")(ids, labels=only_first).loss > 0) == (first > 0)
        assert tiny_model(loss_policy="retarget")(ids, labels=only_first).loss == 0


def collated(policy_of_model: LossPolicy) -> tuple[dict[str, Tensor], Tensor]:
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7]}, {"input_ids": [8, 9, 10]}, {"input_ids": [11]}]
    collate = MetaTokenCollator(UniformInjection(ratio=0.4), meta_token_id=META, pad_token_id=PAD)
    batch = collate(rows)
    with torch.no_grad():
        model = tiny_model(loss_policy=policy_of_model, dtype=torch.float64)
        inputs = {name: value for name, value in batch.items() if name != "meta_indices"}
        return batch, model(**inputs, num_items_in_batch=1).loss


@pytest.mark.parametrize("policy", POLICIES)
def test_number_of_labels_that_a_trainer_counts_equals_the_number_of_loss_terms(policy: LossPolicy) -> None:
    batch, total = collated(policy)
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert counted == 6 + 2 + 0
    inputs = {name: value for name, value in batch.items() if name != "meta_indices"}
    with torch.no_grad():
        mean = tiny_model(loss_policy=policy, dtype=torch.float64)(**inputs).loss
    assert_close(mean * counted, total, 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_accumulated_micro_batches_divided_by_the_steps_count_give_the_loss_of_the_whole_batch(
    policy: LossPolicy,
) -> None:
    model = tiny_model(loss_policy=policy, dtype=torch.float64)
    ids = tokens("x_xx__x", "_xx_xxx", "xx.....")
    labels = ids.masked_fill((ids == META) | (ids == PAD), -100)
    mask = attention_mask_of(ids)
    labels[torch.arange(3), (labels != -100).int().argmax(-1)] = -100
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, labels=labels).loss
        parts = [
            model(ids[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count)
            for i in range(3)
        ]
    assert_close(sum(part.loss for part in parts), whole, 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_meta_token_mask_with_embeddings_gives_the_loss_of_the_ids(policy: LossPolicy) -> None:
    model = tiny_model(loss_policy=policy)
    ids = tokens("x_xx__x")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        from_embeds = model(inputs_embeds=embeds, meta_token_mask=ids == META, labels=ids).loss
        assert torch.equal(from_embeds, model(ids, labels=ids).loss)
