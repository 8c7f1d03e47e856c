"""Draws who sees whom in memory mode, from the definition itself.

python docs/memory_drawing.py      # writes docs/memory.svg
"""

from pathlib import Path

import torch

from metatokens.model.memory import MemoryPolicy
from metatokens.model.memory_reference import visible_pairs

TARGET = Path(__file__).with_name("memory.svg")
POLICY = MemoryPolicy(anchors="meta", window=4, num_sinks=1)
TOKENS = ["the", "cat", "sat", "_", "on", "the", "mat", "_", "and", "it", "fell", "_", "fast", "asleep", "there", "_"]
CELL, LEFT, TOP = 26, 96, 112
STYLE = """
.card{fill:#ffffff;stroke:#d0d7de}.ink{fill:#1f2937}.soft{fill:#57606a;font-size:13px}.head{fill:#1f2937;font-weight:600}
.window{fill:#9cc3e6;stroke:#2f6fb3}.sink{fill:#bfe3c4;stroke:#2e7d4f}.anchor{fill:#ffb454;stroke:#b86e00}
.gone{fill:#f3f4f6;stroke:#d0d7de}.hidden{fill:#fff4e2;stroke:#b86e00;stroke-dasharray:3 2}
"""
LEGEND = (
    ("window", "in the window: the last four tokens of text"),
    ("sink", "a sink: the first token of the text"),
    ("anchor", "an anchor: a meta-token whose text has left the window"),
    ("hidden", "an anchor whose text is in the window: text does not see it"),
    ("gone", "left the window: no longer in the cache"),
)


def kind_of(query: int, key: int, seen: torch.Tensor) -> str:
    """Return how a cell is drawn."""
    is_meta = TOKENS[key] == "_"
    if seen[query, key]:
        num_behind = sum(token != "_" for token in TOKENS[key + 1 : query + 1])
        return "anchor" if is_meta else "window" if num_behind < POLICY.window else "sink"
    return "hidden" if is_meta else "gone"


def draw() -> str:
    """Return the drawing as SVG."""
    is_meta = torch.tensor([[token == "_" for token in TOKENS]])
    seen = visible_pairs(POLICY, is_meta, torch.ones_like(is_meta))[0]
    height = TOP + CELL * len(TOKENS) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {height}" font-family="system-ui, -apple-system, '
        'Segoe UI, Helvetica, Arial, sans-serif" font-size="15" role="img" aria-labelledby="title desc">',
        '<title id="title">Who sees whom in memory mode</title>',
        '<desc id="desc">A row for each token, a column for each one that it may see. Text sees its last four tokens, '
        "the first token of all, and the meta-tokens whose text has left the window. Meta-tokens see all earlier ones. "
        "The rest is gone from the cache.</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="1" y="1" width="978" height="{height - 2}" rx="10"/>',
        '<text class="head" x="24" y="34">Text sees a window, the first tokens, and anchors of the rest</text>',
    ]
    for index, token in enumerate(TOKENS):
        x, y = LEFT + CELL * index, TOP + CELL * index
        parts.append(
            f'<text class="ink" x="{x + CELL / 2:g}" y="{TOP - 8}" transform="rotate(-55 {x + CELL / 2:g} {TOP - 8})">'
            f"{_name(token)}</text>"
        )
        parts.append(f'<text class="ink" x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{_name(token)}</text>')
        parts += [
            f'<rect class="{kind_of(index, key, seen)}" x="{LEFT + CELL * key + 2}" y="{y + 2}" width="{CELL - 4}" '
            f'height="{CELL - 4}" rx="4"/>'
            for key in range(index + 1)
        ]
    for line, (kind, text) in enumerate(LEGEND):
        y = TOP + 8 + 34 * line
        parts.append(f'<rect class="{kind}" x="548" y="{y}" width="{CELL - 4}" height="{CELL - 4}" rx="4"/>')
        parts.append(f'<text class="soft" x="580" y="{y + 16}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _name(token: str) -> str:
    return "meta" if token == "_" else token


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
