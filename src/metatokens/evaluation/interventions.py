"""Interventions: changes to a model at inference, at its meta-tokens alone (paper, Table 2).

    with intervene(model, ZeroEmbedding()):
    with intervene(model, (ZeroEmbedding(), NoPositionEdges())):
        model(...), model.generate(...), measure_perplexity(model, ...)

They act on embeddings, on the rotation of queries and keys, and on the output of the meta-attention, through hooks
that end with the `with` block. No weight is edited. Position ids stay, because transformers takes ids that do not rise
by one for packed documents. If the input has no meta-token, every intervention is the identity to the bit.

Two of them remove positions in different ways. `zero_position` rotates a meta-token by angle zero: text then sees it
as if it stood far away at position 0, not as if it had no position. `no_position_edges` leaves both sides of every
attention edge that touches a meta-token unrotated, and all other edges as they were.

To delete the meta-tokens themselves, do not inject them; no intervention is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from metatokens.config.schema import Frozen
from metatokens.errors import UsageError
from metatokens.lens.interventions import MetaTokenHooks
from metatokens.model import MetaTokenConfig, MetaTokenModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metatokens.model import MetaTokenForCausalLM

FloatArray = npt.NDArray[np.float64]

_NOT_TURNED_ALONE = {
    "xpos": "xpos, under which a position also scales queries and keys",
    "fourier": "fourier, under which a position also scales queries and keys",
}
_WIDE_BACKENDS = ("eager", "sdpa")  # flash and flex attention want values as wide as keys


class _Intervention(Frozen):
    subject: ClassVar[str]
    """The part that it changes; only one intervention can act on a part at a time."""

    def check(self, config: MetaTokenConfig) -> None:
        """Raise UsageError unless the model of `config` has the part that this changes."""
        del config


class _EmbeddingIntervention(_Intervention):
    subject: ClassVar[str] = "embedding"

    def check(self, config: MetaTokenConfig) -> None:
        """Refuse thoughts, whose first and last meta-token would keep the vectors that are added to theirs."""
        if config.thought_length is not None:
            raise _misfit(self, "meta-tokens that are alike", f"thought_length {config.thought_length}")


class ZeroEmbedding(_EmbeddingIntervention):
    """The token embedding becomes zero; a learned position stays added (paper)."""

    kind: Literal["zero_embedding"] = "zero_embedding"


class MeanEmbedding(_EmbeddingIntervention):
    """The token embedding becomes the mean over the tokens of the evaluated text, each as often as it occurs."""

    kind: Literal["mean_embedding"] = "mean_embedding"


class TokenEmbedding(_EmbeddingIntervention):
    """The token embedding becomes that of an ordinary token."""

    kind: Literal["token_embedding"] = "token_embedding"
    token_id: int = Field(ge=0)
    """Id of a text token."""

    def check(self, config: MetaTokenConfig) -> None:
        """Refuse an id outside the text vocabulary, and thoughts."""
        super().check(config)
        num_text_tokens = _num_text_tokens(config)
        if self.token_id >= num_text_tokens:
            expected = f"a text token, below {num_text_tokens}"
            raise _misfit(self, expected, f"id {self.token_id}", "choose another token")


class ZeroPosition(_Intervention):
    """RoPE: rotated by angle zero, as position 0 is; learned positions: the zero vector."""

    subject: ClassVar[str] = "position"
    kind: Literal["zero_position"] = "zero_position"

    def check(self, config: MetaTokenConfig) -> None:
        """Refuse a model whose tokens have no position of their own."""
        if config.position_encoding not in ("rope", "learned"):
            found = f"{config.position_encoding}, under which a token carries no position that could be zeroed"
            found = _NOT_TURNED_ALONE.get(config.position_encoding, found)
            raise _misfit(self, "position_encoding rope or learned", found)


class NoPositionEdges(_Intervention):
    """RoPE: queries and keys stay unrotated on attention edges with a meta-token at either end."""

    subject: ClassVar[str] = "position"
    kind: Literal["no_position_edges"] = "no_position_edges"

    def check(self, config: MetaTokenConfig) -> None:
        """Refuse position encodings other than RoPE, and backends that want values as wide as keys."""
        if config.position_encoding != "rope":
            found = f"{config.position_encoding}, under which queries and keys are not rotated"
            found = _NOT_TURNED_ALONE.get(config.position_encoding, found)
            remedy = "use zero_position" if config.position_encoding == "learned" else "leave out the intervention"
            raise _misfit(self, "position_encoding rope", found, remedy)
        if config._attn_implementation not in _WIDE_BACKENDS:
            expected = f"attn_implementation {' or '.join(_WIDE_BACKENDS)}"
            raise _misfit(self, expected, str(config._attn_implementation), "load the model with one of them")


class NoMetaAttention(_Intervention):
    """Meta-attention adds nothing; the self-attention and feed-forward of the layer stay."""

    subject: ClassVar[str] = "meta-attention"
    kind: Literal["no_meta_attention"] = "no_meta_attention"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices of the layers; off means all."""

    def check(self, config: MetaTokenConfig) -> None:
        """Refuse layers without meta-attention."""
        having = _layers_with_meta_attention(config)
        if not having:
            raise _misfit(self, "a model with meta-attention", "one whose layers have none")
        lacking = [layer for layer in self.layers or () if layer not in having]
        if lacking:
            raise _misfit(self, f"layers out of {having}, those with meta-attention", f"{lacking}", "name others")


Intervention = Annotated[
    ZeroEmbedding | MeanEmbedding | TokenEmbedding | ZeroPosition | NoPositionEdges | NoMetaAttention,
    Field(discriminator="kind"),
]

KINDS: dict[str, type[Frozen]] = {cls.model_fields["kind"].default: cls for cls in get_args(get_args(Intervention)[0])}
_ARGUMENTS = {"token_embedding": "token_id", "no_meta_attention": "layers"}


def parse_intervention(text: str) -> Intervention:
    """Parse an intervention as written on the command line.

    >>> parse_intervention("token_embedding=7"), parse_intervention("no_meta_attention=0,3")
    (TokenEmbedding(kind='token_embedding', token_id=7), NoMetaAttention(kind='no_meta_attention', layers=(0, 3)))

    Raises:
        UsageError: There is no such kind, or its argument is missing, wrong or not accepted.
    """
    kind, has_argument, argument = text.partition("=")
    fields: dict[str, Any] = {"kind": kind}
    if has_argument:
        fields[_ARGUMENTS.get(kind, "argument")] = argument.split(",") if kind == "no_meta_attention" else argument
    try:
        intervention: Intervention = TypeAdapter(Intervention).validate_python(fields)
    except ValidationError:
        nearest = difflib.get_close_matches(kind, KINDS, n=1)
        written = {"token_embedding": "token_embedding=ID", "no_meta_attention": "no_meta_attention[=LAYER,LAYER...]"}
        raise UsageError(
            "intervention",
            expected=f"one of {', '.join(written.get(k, k) for k in KINDS)}",
            found=repr(text),
            remedy=f"did you mean {written.get(nearest[0], nearest[0])}?" if nearest else "name one of them",
        ) from None
    return intervention


def check_interventions(
    model: PreTrainedModel | MetaTokenForCausalLM | nn.Module, interventions: Sequence[Intervention]
) -> None:
    """Raise UsageError if the model lacks the part that an intervention changes, or two change the same part."""
    if not interventions:
        return
    config = _decoder_of(model, interventions[0]).config
    for number, intervention in enumerate(interventions):
        others = [other.kind for other in interventions[:number] if other.subject == intervention.subject]
        if others:
            raise UsageError(
                "interventions",
                expected=f"at most one that changes the {intervention.subject}",
                found=f"{others[0]} and {intervention.kind}",
                remedy="run one at a time",
            )
        intervention.check(config)


@contextmanager
def intervene(
    model: PreTrainedModel | MetaTokenForCausalLM | nn.Module,
    interventions: Intervention | Sequence[Intervention],
    token_counts: npt.ArrayLike | None = None,
) -> Iterator[None]:
    """Apply the interventions in every forward pass of the model within the block.

    Works with and without a cache, with padding on either side, and with `inputs_embeds` and `meta_token_mask`, but
    not under `torch.compile`. Under `no_position_edges` a cache must be filled within the block, and its keys are
    three times as wide.

    Args:
        model: A model of this package, or a wrapper around one.
        interventions: One, or at most one for each of embedding, position and meta-attention; none is the identity.
        token_counts: (num_text_tokens,) how often each id occurs in the evaluated text; `mean_embedding` needs it.
            The mean over the vocabulary could not replace it: most of a vocabulary is rare and hardly trained.

    Raises:
        UsageError: See `check_interventions`.
        ValueError: `token_counts` is missing or unusable for `mean_embedding`.
        TypeError: Something else than interventions.
    """
    if isinstance(interventions, _Intervention):
        interventions = (interventions,)
    for intervention in interventions:
        if not isinstance(intervention, _Intervention):
            raise TypeError(f"interventions are objects such as ZeroEmbedding(), not {intervention!r}")
    check_interventions(model, interventions)
    if not interventions:
        yield
        return
    decoder = _decoder_of(model, interventions[0])
    kinds = {intervention.kind: intervention for intervention in interventions}
    off = kinds.get("no_meta_attention")
    silent_layers: Sequence[int] = ()
    if isinstance(off, NoMetaAttention):
        silent_layers = _layers_with_meta_attention(decoder.config) if off.layers is None else off.layers
    with MetaTokenHooks(
        decoder,
        embedding=_replacement(decoder, interventions, token_counts),
        position="zero" if "zero_position" in kinds else "no_edges" if "no_position_edges" in kinds else None,
        silent_layers=silent_layers,
    ):
        yield


def _replacement(
    decoder: Any, interventions: Sequence[Intervention], token_counts: npt.ArrayLike | None
) -> Tensor | None:
    """Return the vector (C,) that replaces a meta-token's embedding, or None if it stays."""
    weight: Tensor = decoder.embed_tokens.weight.detach()
    for intervention in interventions:
        if isinstance(intervention, ZeroEmbedding):
            return torch.zeros_like(weight[0])
        if isinstance(intervention, TokenEmbedding):
            return weight[intervention.token_id].clone()
        if isinstance(intervention, MeanEmbedding):
            shares = _token_shares(token_counts, _num_text_tokens(decoder.config))
            present = np.flatnonzero(shares)
            rows = weight[torch.from_numpy(present).to(weight.device)]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            return torch.from_numpy(shares[present]).to(rows) @ rows
    return None


def _token_shares(token_counts: npt.ArrayLike | None, num_text_tokens: int) -> FloatArray:
    """Return each token's share of the text, float64; trailing ids that do not occur may be missing from the counts."""
    if token_counts is None:
        raise ValueError("mean_embedding needs token_counts, for example np.bincount(text_ids)")
    counts = np.asarray(token_counts.cpu() if isinstance(token_counts, Tensor) else token_counts, dtype=np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("token_counts must be one finite number a token, not negative and not all zero")
    if counts[num_text_tokens:].any():
        counted = num_text_tokens + int(counts[num_text_tokens:].nonzero()[0][0])
        raise ValueError(f"token_counts must count text tokens, ids below {num_text_tokens}, not id {counted}")
    shares: FloatArray = counts[:num_text_tokens] / counts.sum()
    return shares


def _num_text_tokens(config: MetaTokenConfig) -> int:
    return config.vocab_size if config.meta_token_id is None else config.meta_token_id


def _layers_with_meta_attention(config: MetaTokenConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.has_meta_attention(i)]


def _decoder_of(model: nn.Module | Any, intervention: Intervention) -> Any:
    for module in model.modules():
        if isinstance(module, MetaTokenModel):
            return module
    raise UsageError(
        f"intervention {intervention.kind}",
        expected="a model of this package (model_type metatokens)",
        found=type(getattr(model, "wrapped", model)).__name__,
        remedy="leave out the intervention",
    )


def _misfit(
    intervention: _Intervention, expected: str, found: str, remedy: str = "leave out the intervention"
) -> UsageError:
    kind = type(intervention).model_fields["kind"].default
    return UsageError(f"intervention {kind}", expected=expected, found=found, remedy=remedy)
