"""Effects of the meta-tokens' embedding on attention, against weights of the model's own eager attention."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lens_models import META, build
from metatokens.analysis.attention import sharpening as module
from metatokens.analysis.attention.rows import StratifiedQueries
from metatokens.analysis.attention.sharpening import attention_effects
from metatokens.analysis.inputs.documents import Document
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.lens import Lens


def document(seed: int, meta: tuple[int, ...] = (4, 9, 15)) -> Document:
    ids = torch.randint(0, META, (1, 20), generator=torch.Generator().manual_seed(seed))
    ids[0, list(meta)] = META
    return Document(f"text {seed}", ids, ids == META)


def eager_weights(document: Document, *, zeroed: bool) -> list[Tensor]:
    model = build(num_hidden_layers=2, attn_implementation="eager")
    with torch.no_grad(), intervene(model, [ZeroEmbedding()] if zeroed else []):
        return [weights.double() for weights in model(document.input_ids, output_attentions=True).attentions]


def test_effects_are_differences_of_the_models_own_weights() -> None:
    documents = [document(seed) for seed in range(3)]
    found = attention_effects(Lens(build(num_hidden_layers=2)), documents, queries=StratifiedQueries(512, seed=0))
    for number, one in enumerate(documents):
        full, zeroed = (eager_weights(one, zeroed=zeroed) for zeroed in (False, True))
        for layer in range(2):
            entropies = [torch.special.entr(weights[layer]).sum(-1)[0, :, 4:] for weights in (zeroed, full)]
            drop = (entropies[0] - entropies[1]).mean(-1)
            np.testing.assert_allclose(found["sharpening"][number, layer], drop.numpy(), atol=1e-5)
            np.testing.assert_allclose(found["entropy"][number, layer], entropies[1].mean(-1).numpy(), atol=1e-5)
            masses = [(weights[layer] * one.is_meta[:, None, None]).sum(-1)[0, :, 4:] for weights in (zeroed, full)]
            boost = (torch.logit(masses[1]) - torch.logit(masses[0])).mean(-1)
            np.testing.assert_allclose(found["log_odds_boost"][number, layer], boost.numpy(), atol=1e-4)
            np.testing.assert_allclose(found["meta_mass"][number, layer], masses[1].mean(-1).numpy(), atol=1e-5)
            rows = found["changes"][number, layer]
            assert rows[0] == 2 * 16
            np.testing.assert_allclose(rows[1], -found["sharpening"][number, layer].sum() * 16, atol=1e-3)
            edges, above, boosted, beyond = found["edges"][number, layer]
            assert edges == 2 * sum(20 - place for place in (4, 9, 15))
            assert 0 <= above < edges
            assert 0 <= beyond <= boosted < edges
    assert found["sharpening"].shape == (3, 2, 2)
    assert found["points"].shape == (3 * 2 * 40, 4)
    layers, margin, boost, critical = found["points"].T
    assert set(layers) == {0, 1}
    assert ((critical == 0) == (margin >= 0)).all()
    assert (boost > 0).any()
    assert found["edges"][..., 1:].any((0, 1)).all()


def test_a_sample_of_the_queries_estimates_all_of_them() -> None:
    documents, lens = [document(0)], Lens(build(num_hidden_layers=2))
    whole = attention_effects(lens, documents, queries=StratifiedQueries(512))
    some = attention_effects(lens, documents, queries=StratifiedQueries(10))
    assert some["changes"][0, 0, 0] < whole["changes"][0, 0, 0]
    np.testing.assert_allclose(some["entropy"], whole["entropy"], atol=0.5)


def test_an_audit_in_blocks_of_rows_counts_every_edge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, lens = [document(0)], Lens(build(num_hidden_layers=2))
    whole = attention_effects(lens, documents, queries=StratifiedQueries(512))
    monkeypatch.setattr(module, "AUDITED_SCORES", 3 * 2 * 20)
    blocks = attention_effects(lens, documents, queries=StratifiedQueries(512))
    np.testing.assert_array_equal(blocks["edges"], whole["edges"])
    np.testing.assert_allclose(blocks["changes"], whole["changes"], rtol=1e-6)
    assert blocks["points"].shape == whole["points"].shape


def test_sampled_edges_are_edges_of_their_layer() -> None:
    """Where a document has fewer edges than are sampled, all of them are there."""
    documents, lens = [document(0, (16,)), document(1, (17,))], Lens(build(num_hidden_layers=2))
    found = attention_effects(lens, documents, queries=StratifiedQueries(512))
    assert found["edges"][..., 0].tolist() == [[8.0, 8.0], [6.0, 6.0]]
    layers, margin, boost, critical = found["points"].T
    for layer in range(2):
        of_layer = layers == layer
        assert of_layer.sum() == 14
        _, above, boosted, beyond = found["edges"][:, layer].sum(0)
        assert (margin[of_layer] >= 0).sum() == above
        assert (boost[of_layer] > 0).sum() == boosted
        assert ((boost > critical) & (boost > 0))[of_layer].sum() == beyond


def test_a_document_without_a_meta_token_is_nan_and_changes_no_other() -> None:
    lens, queries = Lens(build(num_hidden_layers=2)), StratifiedQueries(512)
    found = attention_effects(lens, [document(0), document(1, ())], queries=queries)
    alone = attention_effects(lens, [document(0)], queries=queries)
    for name, values in alone.items():
        if name != "points":
            np.testing.assert_array_equal(found[name][:1], values)
            assert np.isnan(found[name][1]).all()
    np.testing.assert_array_equal(found["points"], alone["points"])


def test_documents_without_any_meta_token_are_refused() -> None:
    with pytest.raises(UsageError, match="expected a meta-token that a query can see, found none in 1 documents"):
        attention_effects(Lens(build(num_hidden_layers=2)), [document(0, ())], queries=StratifiedQueries(512))
