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
}
_TERMS = re.compile(
    "|".join(rf"\b{re.escape(term)}(?:s|es)?\b" if term[0].isalpha() else re.escape(term) for term in GLOSSARY),
    flags=re.IGNORECASE,
)
_BY_LOWER = {term.lower(): meaning for term, meaning in GLOSSARY.items()}


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
            Markup('<dfn tabindex="0" data-meaning="{}">{}</dfn>').format(meaning, match[0]),
        ]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def _meaning(found: str) -> str:
    lower = found.lower()
    return next(_BY_LOWER[form] for form in (lower, lower[:-1], lower[:-2]) if form in _BY_LOWER)
