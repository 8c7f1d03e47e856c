"""The recurrence as its paper defines it, token by token and window by window, kept as the oracle of the fast form.

Hutchins et al. 2022, section 3. With s_w the state that window w reads, s_0 learned, e the hidden states of its tokens
under their norm, n(s) = norm(s) + ids, and A(q, k, v) a softmax for each head,

    what e_i reads = W A(Q e_i, K n(s_w), V n(s_w))
    h              = U [A(Q1 n(s_w), K n(s_w), V n(s_w)); A(Q2 n(s_w), k_w, v_w)]
    s_{w+1}        = g s_w + (1 - g) h,   g = sigmoid(b)

where k_w and v_w are the keys and values of self-attention of the tokens of window w, without positions. With two gates
a feed-forward part follows, gated in the same way. No cache.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from metatokens.baselines.cache import RecurrentDynamicLayer
from metatokens.baselines.recurrent import Recurrence, Windows


class ReferenceRecurrence(Recurrence):
    """The parameters of a `Recurrence`, used by loops."""

    def forward(
        self, hidden: Tensor, key: Tensor, value: Tensor, windows: Windows, layer: RecurrentDynamicLayer | None
    ) -> Tensor:
        """Return what tokens read from the state, (B, T, C); zeros at padding."""
        assert layer is None
        slots = windows.slots.expand(hidden.shape[:2])
        is_real = slots < windows.num_windows * self.window
        rows = []
        for row, keep in enumerate(is_real):
            tokens = keep.nonzero()[:, 0].tolist()
            read = self._read_row(hidden[row, tokens], key[row][:, tokens], value[row][:, tokens])
            places = dict(zip(tokens, read, strict=True))
            rows.append([places.get(column, torch.zeros_like(hidden[0, 0])) for column in range(hidden.shape[1])])
        return torch.stack([torch.stack(row) for row in rows])

    def _read_row(self, hidden: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return what each token of a row without padding reads; keys and values are (H, T, D)."""
        state: Tensor = self.initial_state
        read = []
        for start in range(0, len(hidden), self.window):
            named = [self.norm(vector) + name for vector, name in zip(state, self.state_ids, strict=True)]
            shown = self._split([self.k_proj(vector) for vector in named])
            values = self._split([self.v_proj(vector) for vector in named])
            tokens = range(start, min(start + self.window, len(hidden)))
            for token in tokens:
                heads = self._attend(self.token_q_proj(hidden[token]), shown, values)
                read.append(linear(heads, self.token_o_proj.weight))
            changed = []
            for vector, name in zip(state, named, strict=True):
                of_itself = self._attend(self.q_proj(name), shown, values)
                of_window = self._attend(self.window_q_proj(name), key[:, tokens], value[:, tokens])
                changed.append(self._change(vector, torch.cat([of_itself, of_window])))
            state = torch.stack(changed)
        return read

    def _change(self, vector: Tensor, attended: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate.bias)
        vector = share * vector + (1 - share) * self.o_proj(attended)
        if self.mlp is not None:
            share = torch.sigmoid(self.mlp_gate.bias)
            vector = share * vector + (1 - share) * self.mlp(self.mlp_norm(vector))
        return vector

    def _split(self, vectors: list[Tensor]) -> Tensor:
        """Return (H, n, D) of n vectors (H D,)."""
        return torch.stack([vector.view(-1, self.head_dim) for vector in vectors], dim=1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the heads' weighted sums, one after another (H D,), of one query (H D,)."""
        heads = []
        for own, key, value in zip(query.view(-1, self.head_dim), keys, values, strict=True):
            scores = (key @ own / self.head_dim**0.5).exp()
            heads.append(scores / scores.sum() @ value)
        return torch.cat(heads)
