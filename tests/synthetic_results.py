"""Results with a record for every chart of the report, whose numbers follow from formulas and not from a model."""

import math
from typing import Any

import numpy as np

from metatokens.analysis.results import Record, Results, TokenView, Verdict
from metatokens.analysis.run import MEASURES  # which imports every measure

NUM_LAYERS, NUM_HEADS, NUM_DOCUMENTS = 4, 3, 24
HOSTILE = "</script><b id='injected'>x"
TEXT = "The quick brown fox jumps over HOSTILE the lazy dog and runs away from the"
TOKENS = tuple(HOSTILE if word == "HOSTILE" else word for word in TEXT.split())
META_PLACES = (3, 8, 12)


def record(measure: str, value: float | None, **at: Any) -> Record:
    band = 0.05 + 0.1 * abs(value or 0)
    known = value is not None
    return Record(
        measure=measure,
        unit=MEASURES[measure].unit,
        at=at,
        value=value,
        low=value - band if known else None,
        high=value + band if known else None,
        num_documents=NUM_DOCUMENTS if known else 0,
        p_value=0.01 if known else None,
        adjusted_p=0.02 if known and value > 0 else 0.2 if known else None,
        note=None if known else "no pair of documents",
    )


def attention_records() -> list[Record]:
    rows = []
    for layer in range(NUM_LAYERS):
        for head in range(NUM_HEADS):
            wave = math.sin(1 + layer * 1.3 + head)
            rows += [
                record("sharpening", 0.3 * wave, layer=layer, head=head),
                record("log_odds_boost", 0.8 * wave - 0.1, layer=layer, head=head),
                record("meta_mass", 0.2 + 0.15 * wave, layer=layer, head=head),
            ]
        for number, to in enumerate(("text", "meta-tokens")):
            for distance in (0, 1, 2, 4, 8):
                share = (0.2 - 0.1 * number) / (1 + distance)
                rows.append(record("mass_by_distance", share, layer=layer, to=to, distance=distance))
        rows += [
            record("row_sharpening_by_meta_logits", 0.05 * layer, layer=layer),
            record("row_sharpening", 0.06 * layer - 0.04, layer=layer),
            record("share_above", 0.3, layer=layer),
        ]
    return rows


def similarity_records() -> list[Record]:
    return [
        record("cosine", level / (1 + i), layer=layer, distance=2**i, kind=kind, form="centred")
        for layer in range(NUM_LAYERS + 1)
        for i in range(6)
        for kind, level in (("meta", 0.4), ("ordinary", 0.2))
    ]


def compression_records() -> list[Record]:
    rows = [record("answer_entropy", 2.0)]
    for state, factor in (("meta", 0.9), ("last token", 1.1)):
        for beta in (0.01, 0.1, 0.5, 1.0):
            rate = 3 * math.exp(-2 * beta)
            rows += [
                record("rate", rate, state=state, beta=beta),
                record("distortion", 2 * factor * math.exp(-rate), state=state, beta=beta),
            ]
        for target, share in (("answer", 1.0), ("the token before", 0.6)):
            rows.append(record("usable_information", share * factor, state=state, target=target))
        rows.append(record("remaining_entropy", 2.0 - factor, state=state, target="answer"))
    for layer in range(NUM_LAYERS - 1):
        for erased, rise in (("answer", 0.9 - 0.2 * layer), ("shuffled", 0.1)):
            rows.append(record("erasure_loss", rise, layer=layer, erased=erased))
    return rows


def readout_records() -> list[Record]:
    rows = []
    for layer in range(NUM_LAYERS + 1):
        for number, state in enumerate(("meta-token", "token before it", "ordinary token")):
            for window in (1, 4, 16):
                level = (0.8 - 0.2 * number) / (1 + 0.3 * layer) / window**0.5
                rows.append(record("decodability", level, state=state, layer=layer, window=window))
        for state in ("meta-token", "ordinary token"):
            for read, gain in (("state", 0.1), ("mapped state", 0.2)):
                at = {"state": state, "read": read, "layer": layer}
                rows.append(record("divergence", 3 - layer / 2, **at))
                for distance in (1, 4, 16, 64):
                    rank = gain * (1 + layer) / (2 + distance)
                    rows.append(record("reciprocal_rank", rank, **at, distance=distance))
    for layer in range(NUM_LAYERS):
        for number, component in enumerate(("attention", "meta-attention", "feed-forward")):
            share = 0.7 * layer - number
            rows.append(record("attribution", share, component=component, layer=layer))
            rows.append(record("branch_strength", 0.3 + 0.1 * number, branch=component, layer=layer))
    rows.append(record("loss_saved", 0.031, place="text behind"))
    return rows


def causal_records() -> list[Record]:
    conditions = {"full": 3.0, "direct cut": 2.5, "meta cut": 2.8, "both cut": 0.1}
    rows = [record("logit_difference", v, condition=k) for k, v in conditions.items()]
    rows.append(record("interaction", 1.9))
    for intervention, accuracy in (("none", 0.9), ("zero_embedding", 0.31), ("zero_position", 0.88)):
        rows.append(record("accuracy", accuracy, intervention=intervention))
    rows.append(record("knockout", 1.234, mode="zero"))
    rows.append(record("meta_branch_gain", 0.0417, layer=1))
    for layer in range(NUM_LAYERS):
        rows += [
            *(
                record("interchange_effect", share, layer=layer, where=where, direction=direction, window=window)
                for where, share in (("meta-tokens", 1 - layer / 4), ("last token", layer / 6))
                for direction in ("denoise", "noise")
                for window in (1, 3)
            ),
            record("knockout", 0.2 * layer, layer=layer, mode="zero"),
        ]
    for size in (2, 4, 6, 8):
        rows += [record("capacity", 1 - 0.08 * size, size=size), record("chance", 1 / (4 * size), size=size)]
    rows.append(record("chance", 0.07))
    for policy, slope in (("meta", 0.5), ("even", 0.8), ("sinks and window", 0.6)):
        for kept in (0.05, 0.1, 0.25, 0.5):
            rows.append(record("eviction_cost", slope * (1 - kept), policy=policy, kept=kept))
    return rows


def token_view() -> tuple[TokenView, dict[str, np.ndarray]]:
    count = len(TOKENS)
    generator = np.random.Generator(np.random.PCG64(0))
    weights = np.tril(generator.random((NUM_LAYERS, NUM_HEADS, count, count)) ** 4 + 1e-3)
    weights /= weights.sum(-1, keepdims=True)
    num_meta = len(META_PLACES)
    meta_weights = np.tril(np.ones((NUM_LAYERS, NUM_HEADS, num_meta, num_meta)))
    meta_weights /= meta_weights.sum(-1, keepdims=True)
    loss = generator.random(count)
    loss[list(META_PLACES)] = np.nan
    num_queries = np.arange(count, 0, -1)
    nothing = np.where(np.isnan(loss), np.nan, 0)
    shares = generator.normal(0, 1, (3, NUM_LAYERS, count)) + nothing
    cosines = np.tril(generator.uniform(-1, 1, (NUM_LAYERS, count, count)))
    arrays = {
        "view0_attention": np.round(255 * np.sqrt(weights)).astype(np.uint8),
        "view0_meta_attention": np.round(255 * np.sqrt(meta_weights)).astype(np.uint8),
        "view0_meta_attention_tokens": np.array(META_PLACES, dtype=np.int16),
        "view0_cosine_raw": np.round(127 * cosines).astype(np.int8),
        "view0_cosine_centred": np.round(-127 * cosines).astype(np.int8),
        "view0_loss_with": loss,
        "view0_loss_without": loss + 0.1,
        "view0_received_attention": (weights.sum(-2) / num_queries).astype(np.float32),
        "view0_logit": (shares.sum((0, 1)) + 1).astype(np.float32),
        "view0_logit_attention": shares[0].astype(np.float32),
        "view0_logit_meta_attention": shares[1].astype(np.float32),
        "view0_logit_mlp": shares[2].astype(np.float32),
        "view0_patch_effect": generator.uniform(-0.2, 1, (NUM_LAYERS + 1, count)).astype(np.float32),
    }
    is_meta = tuple(place in META_PLACES for place in range(count))
    view = TokenView(
        title="a hostile text",
        tokens=TOKENS,
        is_meta=is_meta,
        arrays={name.removeprefix("view0_"): name for name in arrays},
    )
    return view, arrays


def attention_of_documents() -> dict[str, np.ndarray]:
    """Numbers of documents whose means are the records of the heat maps; two documents have none."""
    generator = np.random.Generator(np.random.PCG64(3))
    arrays = {}
    for name in ("sharpening", "log_odds_boost", "meta_mass"):
        means = np.zeros((NUM_LAYERS, NUM_HEADS))
        for one in attention_records():
            if one.measure == name:
                means[int(one.at["layer"]), int(one.at["head"])] = one.value
        noise = generator.normal(0, 0.08, (NUM_DOCUMENTS, NUM_LAYERS, NUM_HEADS))
        values = np.full((NUM_DOCUMENTS + 2, NUM_LAYERS, NUM_HEADS), np.nan, dtype=np.float32)
        values[[row for row in range(NUM_DOCUMENTS + 2) if row not in (4, 9)]] = means + noise - noise.mean(0)
        arrays[name] = values
    return arrays


def long_view() -> tuple[TokenView, dict[str, np.ndarray]]:
    """A text whose attention is sparse: five heads of which the last three are kept, eight weights a row."""
    count, num_kept, kept_heads = 300, 8, (2, 3, 4)
    generator = np.random.Generator(np.random.PCG64(4))
    shape = (NUM_LAYERS, 1 + len(kept_heads), count, num_kept)
    keys, weights = np.zeros(shape, dtype=np.uint16), np.zeros(shape)
    for row in range(count):
        size = min(num_kept, row + 1)
        chosen = generator.random((*shape[:2], row + 1)).argsort(-1)[..., :size]
        keys[:, :, row, :size] = chosen
        weights[:, :, row, :size] = -np.sort(-generator.dirichlet(np.ones(size), shape[:2]), axis=-1)
    is_meta = tuple(place % 10 == 9 for place in range(count))
    loss = np.where(is_meta, np.nan, generator.random(count)).astype(np.float32)
    arrays = {
        "view1.attention_heads": np.tile(np.array(kept_heads, dtype=np.int16), (NUM_LAYERS, 1)),
        "view1.attention_keys": keys,
        "view1.attention_weights": np.round(255 * np.sqrt(weights)).astype(np.uint8),
        "view1.received_attention": generator.random((NUM_LAYERS, 5, count)).astype(np.float32),
        "view1.loss_with": loss,
        "view1.loss_without": loss + np.float32(0.2),
    }
    tokens = tuple(f" w{place}" for place in range(count))
    names = {name.removeprefix("view1."): name for name in arrays}
    return TokenView(title="a long text", tokens=tokens, is_meta=is_meta, arrays=names), arrays


def build_results() -> tuple[Results, dict[str, np.ndarray]]:
    view, arrays = token_view()
    longer, of_longer = long_view()
    arrays |= of_longer | attention_of_documents()
    generator = np.random.Generator(np.random.PCG64(1))
    margin, boost = generator.normal(-1, 2, 300), generator.normal(1, 2, 300)
    critical = np.where(margin >= 0, 0, -1.5 * margin)
    arrays["theory_points"] = np.stack([np.arange(300) % NUM_LAYERS, margin, boost, critical], axis=1)
    verdicts = [
        Verdict(
            claim="Attention entropy falls with meta-tokens",
            paper="+1.40 nats",
            endpoint="mean sharpening over heads and layers",
            verdict="supported",
            share_of_paper=0.2 / 1.40,
            value=0.2,
            low=0.1,
            high=0.3,
            unit="nats",
            num_documents=NUM_DOCUMENTS,
            p_value=0.0004,
        ),
        Verdict(
            claim="Meta-tokens compress",
            paper="lower distortion at equal rate",
            endpoint="area between hulls",
            verdict="inconclusive",
            value=-0.01,
            low=-0.05,
            high=0.03,
            unit="nats²",
            num_documents=NUM_DOCUMENTS,
        ),
        Verdict(
            claim="Residuals cache near context",
            paper="spikes on near context",
            endpoint="excess cosine at distance 1",
            verdict="not tested",
            note="too few documents",
        ),
    ]
    results = Results(
        title="Analysis of a synthetic model",
        checkpoint={"name": "synthetic", "sha256": "0" * 64, "layers": NUM_LAYERS, "heads": NUM_HEADS},
        config={"seed": 0},
        config_sha256="1" * 64,
        endpoints_sha256="2" * 64,
        data={"documents": NUM_DOCUMENTS, "source": "formulas"},
        seed=0,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        command="metatokens analyze runs/synthetic --out analysis",
        not_run=("probes: not part of this run",),
        records=[
            *attention_records(),
            *similarity_records(),
            *readout_records(),
            *compression_records(),
            *causal_records(),
            record("excess_cosine", None, layer=0, distance=512),
        ],
        verdicts=verdicts,
        token_views=[view, longer],
    )
    return results, arrays
