"""The words of the page that a reader may not know; a term's first mention in a text explains itself on hover."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "meta-token": "a token without text, put between the tokens of a text; it is never predicted",
    "meta-attention": "a second attention of a layer, in which meta-tokens see each other alone",
    "embedding": "the vector that a token enters the first layer with",
    "logit difference": "logit of the right answer minus that of the other prompt's answer; 0 is chance",
    "logit": "the score of a token before the softmax",
    "entropy": "how spread out an attention row is, in nats; 0 where one key takes all",
    "key-value cache": "keys and values of earlier tokens, kept so that later tokens can attend to them",
    "cosine": "similarity of two directions, from -1 to 1; here after the mean state was subtracted",
    "state": "the residual vector of one token between two layers",
    "95% interval": "repeated on other documents of the same kind, 95% of such intervals hold the true value",
    "nats": "the unit of information with the natural logarithm; 1 nat is 1.44 bits",
    "denoise": "put states of the prompt with the right item into the run on the other prompt",
    "noise": "put states of the other prompt into the run on the prompt with the right item",
    "Holm": "a correction of p-values for the number of claims tested together",
    "BCa": "a bootstrap interval, corrected for bias and skew",
    "perplexity": "exp of the mean loss per token",
    "anchor": "a meta-token of a grafted model, which puts one between the tokens by itself",
    "meta key": "the key of a meta-token, by which queries of attention find it",
}
AXES = {
    "against": "whose state the one of the last meta-token is compared with",
    "beta": "price of the rate: a bottleneck is fitted to the smallest distortion + beta x rate",
    "branch": "the part of a layer that adds to the state",
    "component": "the part of the model that adds to the logit",
    "condition": "which of the paths from the item to the answer are cut",
    "direction": "denoise asks whether states suffice, noise whether they are needed",
    "distance": "how many tokens before",
    "erased": "what is taken out of the states",
    "form": "raw, centred (minus the mean state), or z-scored (also over the standard deviation)",
    "head": "of the layer, counted from 0",
    "intervention": "what is taken from the meta-tokens, or from the anchors of a graft",
    "kept": "share of the cache of the prefix that stays; the rest is dropped",
    "kind": "whose states are compared with earlier ones",
    "layer": "counted from 0; of states, 0 is before the first layer",
    "mode": "how meta-attention is removed",
    "place": "at the meta-tokens, or at the text right behind them",
    "policy": "which columns of the cache stay beside its first and its newest few",
    "read": "whether the output head reads the state itself or the state mapped to a final one",
    "size": "the task's own measure of length, such as bits of a parity or items of a list",
    "state": "whose residual vector is read",
    "target": "what a probe has to tell",
    "to": "the keys that get the weight",
    "where": "whose states are exchanged",
    "window": "how many layers, or tokens, are taken together",
}
"""What the coordinates of measures are."""
COLUMNS = {
    "value (95% interval)": "the number, in the unit of its measure, and its 95% interval",
    "n": "documents, instances or pairs that the number is of",
    "adjusted p": "p-value, corrected for all rows of the measure (false discovery rate)",
    "note": "why there is no number or no interval",
}
"""What the other columns of tables are."""
_PLAIN_AXES = {"kept": "share of the cache kept", "size": "size of the task"}
_PLAIN = {
    "policy": {
        "window": "newest columns",
        "meta": "meta-tokens",
        "slots": "tokens before meta-tokens",
        "even": "evenly spaced",
        "heavy_hitters": "most attended",
    },
    "kind": {"meta": "meta-tokens", "ordinary": "ordinary tokens", "meta, shuffled": "meta-tokens, shuffled"},
}
_WRITTEN = {"cka": "CKA", "r squared": "R\N{SUPERSCRIPT TWO}"}
_SIGNS = re.compile(rf"\b(?:{'|'.join(_WRITTEN)})\b")
_TERMS = re.compile(
    "|".join(rf"\b{re.escape(term)}(?:s|es)?\b" if term[0].isalpha() else re.escape(term) for term in GLOSSARY),
    flags=re.IGNORECASE,
)
_DEFINED = Markup('<dfn tabindex="0" data-meaning="{}">{}</dfn>')
_BY_LOWER = {term.lower(): meaning for term, meaning in GLOSSARY.items()}


def words(name: str) -> str:
    """Return the name of a measure or part as words."""
    return _SIGNS.sub(lambda found: _WRITTEN[found[0]], name.replace("_", " "))


def name_axis(axis: str) -> str:
    """Return the name of a coordinate for people."""
    return _PLAIN_AXES.get(axis, words(axis))


def name_place(axis: str, place: str | float) -> str:
    """Return a value of a coordinate for people."""
    if isinstance(place, str):
        return _PLAIN.get(axis, {}).get(place, words(place))
    return f"{place:g}" if isinstance(place, float) else str(place)


def explain_column(name: str) -> Markup:
    """Return the head of a table's column, a coordinate or one of `COLUMNS`, as markup with its meaning."""
    meaning = AXES.get(name) or COLUMNS.get(name)
    label = name_axis(name)
    return _DEFINED.format(meaning, label) if meaning else escape(label)


def explain(text: str) -> Markup:
    """Return text as markup, the first mention of each term with its meaning; all of the text is escaped."""
    parts, end, seen = [], 0, set()
    for match in _TERMS.finditer(text):
        meaning = _meaning(match[0])
        if meaning in seen:
            continue
        seen.add(meaning)
        parts += [
            escape(text[end : match.start()]),
            _DEFINED.format(meaning, match[0]),
        ]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def _meaning(found: str) -> str:
    lower = found.lower()
    return next(_BY_LOWER[form] for form in (lower, lower[:-1], lower[:-2]) if form in _BY_LOWER)
