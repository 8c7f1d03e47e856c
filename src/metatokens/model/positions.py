"""Position encodings that rotate queries and keys: RoPE with transformers' own frequencies and scalings, xPos, Fourier.

Those that add to the scores are in `position_bias.py`; learned positions are an embedding of the model; "none" needs
nothing. Every function works on explicit positions, so packed meta-attention sees the distances that its tokens have in
the whole sequence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from .compatibility import LlamaRotaryEmbedding
from .position_scores import SinusoidEmbedding

XPOS_GAMMA = 0.4  # Sun et al. 2022, section 3.2
# positions per power of zeta, as in microsoft/torchscale@main:torchscale/component/xpos_relative_position.py
XPOS_SCALE_BASE = 512
FOURIER_GAIN = 0.3  # of 60 million parameters, in TsinghuaC3I's OLMo
FOURIER_SEED = 0


class Rotary(Protocol):
    """How positions enter the queries and keys of T tokens; an attention knows nothing else of RoPE."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, (B, H, T, any width), whose products are the scores.

        Keys may be wider than queries: the surplus is cached for later queries and not attended to.
        """

    def at(self, index_BM: Tensor) -> Self:
        """Return the same for the tokens at `index_BM` (B, M) of each row."""


class RotaryTables(NamedTuple):
    """RoPE. A tuple, so that whatever moves or casts a layer's inputs finds the tensors in it."""

    cos: Tensor
    """(B or 1, T, D), or (B or 1, H, T, D) where heads differ."""
    sin: Tensor
    """As `cos`."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions; the shapes stay."""
        return rotate(query_BHTD, self.cos, self.sin), rotate(key_BHTD, self.cos, self.sin)

    def at(self, index_BM: Tensor) -> Self:
        """Return the tables (B, M, D) of the tokens at `index_BM`."""
        return self._replace(cos=_take_positions(self.cos, index_BM), sin=_take_positions(self.sin, index_BM))


def rotate(states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension d together with dimension d + D / 2.

    Equal to transformers' `apply_rotary_pos_emb`, which makes five tensors of this size and nine for the gradient. Here
    one is made and filled in place, both ways. The tables, (B or 1, T, D) or (B or 1, H, T, D), get no gradient.

    Returns:
        (B, H, T, D) in the wider dtype of states and tables.
    """
    cos, sin = (table.detach() if table.ndim == 4 else table.detach()[:, None] for table in (cos, sin))
    if torch.is_grad_enabled() and states_BHTD.requires_grad:
        rotated: Tensor = _Rotation.apply(states_BHTD, cos, sin, False)  # type: ignore[no-untyped-call]
        return rotated
    return _turn(states_BHTD, cos, sin, back=False)


def _turn(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Multiply by the matrix of the rotation, or by its transpose."""
    turned = states * cos
    (first, second), (of_first, of_second) = turned.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    from_first, from_second = states.chunk(2, dim=-1)
    first.addcmul_(from_second, of_second if back else of_first, value=1 if back else -1)
    second.addcmul_(from_first, of_first if back else of_second, value=-1 if back else 1)
    return turned


class _Rotation(torch.autograd.Function):
    """A rotation as one step of the graph, which keeps the tables alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        return _turn(states, cos, sin, back=back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, sin, not ctx.back), None, None, None  # type: ignore[no-untyped-call]


class XposTables(NamedTuple):
    """RoPE with scores that decay with the distance, at a rate of its own for each pair of dimensions."""

    rotation: RotaryTables
    scale: Tensor
    """(B or 1, T, D): zeta to the power of the position, float32 or wider."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate, then multiply queries and divide keys by the scale; the shapes stay."""
        query_BHTD, key_BHTD = self.rotation.apply(query_BHTD, key_BHTD)
        scale = self.scale[:, None]
        return (query_BHTD * scale).to(query_BHTD.dtype), (key_BHTD / scale).to(key_BHTD.dtype)

    def at(self, index_BM: Tensor) -> Self:
        """Return the tables of the tokens at `index_BM`."""
        return self._replace(rotation=self.rotation.at(index_BM), scale=_take_positions(self.scale, index_BM))


def _take_positions(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows of a table, (B or 1, T, D) or (B or 1, H, T, D), at (B, M)."""
    table = table.expand(index.shape[0], *table.shape[1:])
    places = index[..., None] if table.ndim == 3 else index[:, None, :, None]
    return torch.take_along_dim(table, places, dim=-2)


class MetaTokenRotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin of the positions, from transformers' ROPE_INIT_FUNCTIONS (default, linear, dynamic, yarn ...).

    Its name and its `original_inv_freq` make `from_pretrained` refill the buffers, which are not saved.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor
    max_seq_len_cached: int | Tensor
    original_max_seq_len: int

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device but stay exact: bfloat16 would turn far positions by whole radians too much."""
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if not exact[0].is_meta:
            self.inv_freq, self.original_inv_freq = (tensor.to(self.inv_freq.device) for tensor in exact)
        return self

    def forward(self, hidden: Tensor, position_ids: Tensor) -> RotaryTables:
        """Return the tables of positions (B or 1, T), in the dtype of `hidden`."""
        if self.rope_type == "dynamic" and self.max_seq_len_cached > self.original_max_seq_len:
            # transformers keeps the frequencies of the longest batch so far; here they follow from this one alone
            self.inv_freq, self.max_seq_len_cached = self.original_inv_freq, self.original_max_seq_len
        return RotaryTables(*super().forward(hidden, position_ids))


class XposRotaryEmbedding(MetaTokenRotaryEmbedding):
    """xPos (Sun et al. 2022): RoPE whose pair d of a score decays as zeta_d^(distance / 512).

    zeta_d = (2 d / D + 0.4) / 1.4. The query carries the factor zeta^(t / 512) and the key zeta^(-t / 512). t is
    counted from the middle of the window, which keeps both within range. torchscale counts from the middle of each
    call; here the middle is fixed, so cached keys stay right. Scores do not depend on it.

    At the ends of the window the two factors are far from one, and must stay within the range of the number format:
    float16 has room for 3,966 positions, bfloat16 and float32 for 35,694.
    """

    def forward(self, hidden: Tensor, position_ids: Tensor) -> XposTables:  # type: ignore[override] # another table
        """Return the tables of positions (B or 1, T), in the dtype of `hidden`."""
        self._check_range(hidden)
        rotation = super().forward(hidden, position_ids)
        pairs = self.inv_freq.shape[0]
        zeta = (torch.arange(pairs, device=hidden.device) / pairs + XPOS_GAMMA) / (1 + XPOS_GAMMA)
        power = (position_ids - self.config.num_positions // 2) / XPOS_SCALE_BASE
        scale = zeta ** power[..., None]
        precision = torch.promote_types(hidden.dtype, torch.float32)
        return XposTables(rotation, torch.cat([scale, scale], dim=-1).to(precision))

    def _check_range(self, hidden: Tensor) -> None:
        """Raise ValueError where a product of a late query and an early key leaves the range of the number format."""
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # each side reaches (1 / zeta_0)^(window / 2 / 512), and masked scores, too, are products of both
        base = (1 + XPOS_GAMMA) / XPOS_GAMMA
        longest = int(-math.log(torch.finfo(dtype).tiny) / math.log(base) * XPOS_SCALE_BASE)
        if self.config.num_positions > longest:
            raise ValueError(
                f'position_encoding "xpos" over {self.config.num_positions} positions leaves the range of {dtype}, '
                f"which has room for {longest}: use a wider dtype or a shorter window"
            )


class FourierEmbedding(nn.Module):
    """Fourier position embedding (FoPE, Hua et al. 2024): pairs of dimensions turn by sums of frequencies.

    A frequency of RoPE with less than one turn in the window is left out. The n that remain are mixed, in a way of its
    own for each head, into at most D / 4: cos(t w) W with a fixed random matrix W, and sin(t w) likewise with another.
    The other pairs do not turn: at frequency zero cos is 1 and sin 0, where the authors' code has 1 for both.

    The matrices follow from a fixed seed, so they are not saved: identity in steps, plus a normal draw after Glorot,
    with the authors' gain for their smallest model.
    """

    def __init__(self, config: Any) -> None:
        """Draw the matrices that `config` asks for, (2, H, n, at most D / 4) float32, on the CPU."""
        super().__init__()
        self.pairs, theta = config.head_dim // 2, config.rope_parameters["rope_theta"]
        slowest = 2 * math.pi / config.num_positions
        frequencies = [theta ** (-pair / self.pairs) for pair in range(self.pairs)]
        self.frequencies = [one for one in frequencies if one >= slowest] or frequencies[:1]
        num_in = len(self.frequencies)
        num_out = max(1, min(num_in, self.pairs // 2))
        generator = torch.Generator().manual_seed(FOURIER_SEED)
        shape = 2, config.num_attention_heads, num_in, num_out
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        rows, columns = torch.arange(num_in, device="cpu")[:, None], torch.arange(num_out, device="cpu")
        steps = rows == columns * math.ceil(num_in / num_out)
        # no buffer: neither saved nor rounded to half precision
        self.mixing = steps + drawn * FOURIER_GAIN * (2 / (num_in + num_out)) ** 0.5

    def forward(self, hidden: Tensor, position_ids: Tensor) -> RotaryTables:
        """Return the tables of positions (B or 1, T), in the dtype of `hidden`."""
        exact: dict[str, Any] = {
            "dtype": torch.promote_types(hidden.dtype, torch.float32),
            "device": hidden.device,
        }
        angles = position_ids[..., None] * torch.tensor(self.frequencies, **exact)
        waves = torch.stack([angles.cos(), angles.sin()])[:, :, None]  # (2, B, 1, T, n)
        cos, sin = waves @ self.mixing.to(**exact)[:, None]
        idle = self.pairs - cos.shape[-1]
        cos, sin = nn.functional.pad(cos, (0, idle), value=1.0), nn.functional.pad(sin, (0, idle))
        return RotaryTables(*(torch.cat([half, half], -1).to(hidden.dtype) for half in (cos, sin)))


ROTARY_EMBEDDINGS: dict[str, Callable[..., nn.Module]] = {
    "rope": MetaTokenRotaryEmbedding,
    "xpos": XposRotaryEmbedding,
    "fourier": FourierEmbedding,
    "transformer_xl": SinusoidEmbedding,
}
"""What makes the tables of positions, by position_encoding."""
