"""Model cards: the README.md of a model's folder, as the Hugging Face hub shows it.

A card says what the folder itself and its run can tell: parameters, data, tokens, evaluation, how to load the model and
what its meta-tokens need. Intended use, limits and the license are for its owner to write, so a card that lies in a
folder already is never written over.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from metatokens.data.special_tokens import META_TOKEN
from metatokens.errors import redact
from metatokens.graft.grafting import graft_of
from metatokens.graft.student import Student
from metatokens.model import MetaTokenConfig
from metatokens.training.checkpoint import MODEL_CARD

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAPER = "https://arxiv.org/abs/2509.16278"


@dataclass(frozen=True)
class Training:
    """What a card says of the training; of a model that was only changed, the verb alone is known."""

    verb: str
    """The command that made the model, such as pretrain."""
    data: str = ""
    """What was read: the name of a text, the id of a data set, or a recall task."""
    base_model: str = ""
    """What it started from: a folder or an id on the hub; empty for new weights."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Steps and tokens by name."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation by name."""


def write_model_card(folder: Path, model: Any, training: Training, *, name: str) -> None:
    """Write the card of a model that lies in `folder`; a card that is there already stays as it is."""
    path = folder / MODEL_CARD
    if not path.exists():
        card = f"---\n{_metadata(model, training, name).to_yaml()}\n---\n\n{_text(model, training, name)}"
        ModelCard(redact(card)).save(path)


def _metadata(model: Any, training: Training, name: str) -> ModelCardData:
    has_code = type(model.config) is MetaTokenConfig
    return ModelCardData(
        model_name=name,
        license="unknown",
        library_name="metatokens" if isinstance(model, Student) else "transformers",
        pipeline_tag="text-generation",
        tags=["metatokens", "meta-tokens", *(["custom_generate"] if has_code else [])],
        datasets=[training.data] if _is_on_the_hub(training.data) else None,
        base_model=training.base_model if _is_on_the_hub(training.base_model) else None,
    )


def _is_on_the_hub(name: str) -> bool:
    """Tell an id from a path, as `metatokens.training.loading.ModelFolder` does."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).parent.exists()


def _text(model: Any, training: Training, name: str) -> str:
    sections = [
        f"# {name}\n\nA language model that knows a [meta-token]({_PAPER}), a filler token between those of a text.\n"
        f"`metatokens {training.verb}` made it.",
        _table(_facts(model, training)),
        "## Evaluation\n\n"
        + (
            _table({key.replace("_", " "): f"{value:.4g}" for key, value in training.evaluation.items()})
            or "None is recorded."
        ),
        *([_graft(model)] if isinstance(model, Student) else [_loading(model), _meta_tokens(model)]),
        "## License\n\nUnknown. Its owner sets `license` at the head of this file.",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(model: Any, training: Training) -> dict[str, str]:
    config = model.config
    meta_attention = sum(p.numel() for key, p in model.named_parameters() if ".meta_attn." in key)
    base = training.base_model if _is_on_the_hub(training.base_model) else Path(training.base_model).name
    window = getattr(config, "trained_window", getattr(config, "max_position_embeddings", None))
    return {
        "trained parameters" if isinstance(model, Student) else "parameters": f"{model.num_parameters():,}"
        + (f", {meta_attention:,} in meta-attention" if meta_attention else ""),
        "architecture": f"{type(getattr(model, 'wrapped', model)).__name__}, {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} heads",
        **({"window": f"{window:,} positions, meta-tokens included"} if window else {}),
        **({"data": training.data} if training.data else {}),
        **({"started from": base} if base else {}),
        **{key: f"{value:,}" for key, value in training.numbers.items()},
    }


def _graft(model: Student) -> str:
    config = graft_of(model.wrapped).config
    kept = (
        f"After every {config.every}. token it reads a meta-token by itself, and text sees the meta-tokens of the text "
        "before"
        if config.anchors == "meta"
        else f"Every {config.every}. token is read by changed weights and stays visible"
    )
    return f"""## How to load it

```python
from metatokens.graft import load_graft

model = load_graft(path)
```

`path` is this folder, an adapter: it holds what was trained, names the model that it was trained on, and loads onto no
other. The model takes and returns text, which sees its last {config.window} tokens and its first {config.num_sinks}.
{kept}."""


def _loading(model: Any) -> str:
    if type(model.config) is MetaTokenConfig:
        needs = "With `import metatokens` it loads without `trust_remote_code`."
        package, trust = "", ", trust_remote_code=True"
    elif str(model.config.model_type).startswith("metatokens"):
        needs = "It needs the package `metatokens`."
        package, trust = "import metatokens  # makes the model known to transformers\n", ""
    else:
        needs, package, trust = "It is an ordinary model of transformers.", "", ""
    return f"""## How to load it

```python
{package}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path{trust})
tokenizer = AutoTokenizer.from_pretrained(path)
```

`path` is this folder or its id on the hub. {needs}"""


def _meta_tokens(model: Any) -> str:
    schedule = getattr(model.generation_config, "meta_schedule", None)
    if schedule is None:
        rule = (
            "The generation config states no schedule, so `generate` inserts none: put them into the prompt, or give "
            '`generate` a `meta_schedule` such as `{"kind": "periodic", "text_tokens": 9}`.'
        )
    elif schedule["kind"] == "none":
        rule = "The model was trained without them, and the generation config says so: `generate` inserts none."
    else:
        rule = (
            f"The generation config states the schedule `{json.dumps(schedule)}`, by which `generate` and what calls\n"
            'it insert them; `meta_schedule={"kind": "none"}` turns it off.'
        )
    return f"""## What its meta-tokens need

The meta-token is `{META_TOKEN}`, id {model.config.meta_token_id}. {rule}
A forward pass, a training or an evaluation of your own sees only the meta-tokens that its `input_ids` hold. Meta-tokens
are never targets, and `skip_special_tokens=True` leaves them out of a text."""


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]) if rows else ""
