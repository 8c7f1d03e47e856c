"""Files that say anything: each reader refuses in one line with its exit code, or takes what it would have taken."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset, to_yaml
from metatokens.config.schema import PretrainConfig
from metatokens.config.sweep import load_sweep
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.errors import MetaTokensError
from metatokens.storage import unseal
from metatokens.training.checkpoint import read_state, verify_checkpoint, write_manifest
from metatokens.training.untrusted import read_config

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.integers(), st.just(10**30), st.floats(), st.text(max_size=8)
)
SCALARS |= st.sampled_from(["", "step-00000004", "../x", "/etc/passwd", "{seed}", "1e3", "0x10", "none", "1:30"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SWEEP = {
    "preset": "tiny/recall",
    "axes": {"arm": {"meta": None, "pause": {"start.model.meta_attention_layers": "none"}}},
    "seeds": [0],
    "reference": "pause",
    "evaluations": [{"name": "lengths", "ask": {"lengths": ["9-24"], "instances": 12}}],
}
MODEL = {"model_type": "metatokens", "num_hidden_layers": 1, "hidden_size": 8, "auto_map": {"AutoConfig": "a.B"}}
STATE = {"step": 4, "content_id": "c", "world_size": 1, "text_tokens": 9, "training_flops": 1.5, "config": {"seed": 0}}


class Kind(NamedTuple):
    """One kind of file; `read` returns what stays the same whenever the file is not refused, or raises an error."""

    file: Path
    tree: Any
    dump: Callable[[Any], str]
    read: Callable[[], Any]
    exit_codes: set[int]
    expected: Any = None

    def __repr__(self) -> str:  # Hypothesis shows all of them
        return self.file.name


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"{number} sheep on a hill, {number} in the dale. " * 5)
    tokens, checkpoint = folder / "tokens", folder / "step-00000004"
    options = SourceOptions()
    prepare(
        str(folder / "text"),
        tokens,
        tokenizer=None,
        vocab_size=260,
        validation_fraction=0.3,
        shard_tokens=500,
        options=options,
    )
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(MODEL))
    (checkpoint / "state.json").write_text(json.dumps(STATE))
    write_manifest(checkpoint)

    def tokens_read() -> Any:
        with TokenDataset.open(tokens) as dataset:
            return dataset.content_id, dataset.vocab_size, dataset.read("train", 0, 50).tolist()

    def config_read(file: Path, schema: Any) -> Callable[[], Any]:
        def read() -> None:
            config = load_preset(file, schema=schema)
            (folder / "again.yaml").write_text(to_yaml(config))
            assert load_preset(folder / "again.yaml", schema=schema) == config

        return read

    def state_read() -> None:
        state = read_state(checkpoint)
        assert type(state.step) is type(state.world_size) is type(state.skipped_steps) is int
        assert isinstance(state.content_id, str)
        assert isinstance(state.config, dict | None)

    def unsealed(file: Path) -> Any:
        """Return the tree of a file that readers take without its seal, which would refuse every change."""
        return json.loads(unseal(file.read_text(), "", remedy=""))

    presets = {
        "preset": (PretrainConfig, load_preset("tiny/meta")),
        "task": (FinetuneConfig, load_preset("tiny/recall", schema=FinetuneConfig)),
    }
    tree = {name: yaml.safe_load(to_yaml(config)) for name, (_, config) in presets.items()}
    found = {
        "token manifest": Kind(
            tokens / "manifest.json", unsealed(tokens / "manifest.json"), json.dumps, tokens_read, {3}
        ),
        "checkpoint manifest": Kind(
            checkpoint / "manifest.json",
            unsealed(checkpoint / "manifest.json"),
            json.dumps,
            lambda: verify_checkpoint(checkpoint),
            {4},
        ),
        "checkpoint state": Kind(checkpoint / "state.json", STATE, json.dumps, state_read, {4}),
        "model config": Kind(
            checkpoint / "config.json",
            MODEL,
            json.dumps,
            lambda: type(read_config(checkpoint)),
            {4},
        ),
        **{
            name: Kind(
                folder / f"{name}.yaml",
                tree[name],
                yaml.safe_dump,
                config_read(folder / f"{name}.yaml", schema),
                {2, 3},
            )
            for name, (schema, _) in presets.items()
        },
        "sweep": Kind(
            folder / "sweep.yaml", SWEEP, yaml.safe_dump, lambda: type(load_sweep(folder / "sweep.yaml")), {2, 3}
        ),
    }
    for kind in found.values():
        kind.file.write_text(kind.dump(kind.tree))
    return {name: kind._replace(expected=kind.read()) for name, kind in found.items()}


def places(tree: Any) -> list[tuple[Any, ...]]:
    """Return the path of every value of a tree, that of the whole first."""
    found: list[tuple[Any, ...]] = [()]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(key, *path) for path in places(value)]
    return found


def changed(tree: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return a copy in which the value at a path is another."""
    if not path:
        return change(tree)
    copy = tree.copy()
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


@st.composite
def contents(draw: st.DrawFn, kind: Kind) -> str | bytes:
    """Draw what a file holds: its tree with another value, another key or without one; other bytes; or other text."""
    way = draw(st.sampled_from(["value", "key", "without", "bytes", "text", "deep"]))
    if way == "text":
        return draw(st.text(st.characters(exclude_categories=["Cs"])) | VALUES.map(kind.dump))
    if way == "deep":
        return draw(st.sampled_from(["[", '{"a":', "- ", "? "])) * draw(st.sampled_from([10, 1_000, 50_000]))
    if way == "bytes":
        content = bytearray(kind.dump(kind.tree).encode())
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    path = draw(st.sampled_from(places(kind.tree)))
    value = draw(VALUES)
    if way == "value":
        return kind.dump(changed(kind.tree, path, lambda _: value))
    mappings = [path for path in places(kind.tree) if isinstance(at(kind.tree, path), dict)]
    path = draw(st.sampled_from(mappings))
    keys = list(at(kind.tree, path))
    if way == "without" and keys:
        key = draw(st.sampled_from(keys))
        return kind.dump(changed(kind.tree, path, lambda node: {k: v for k, v in node.items() if k != key}))
    return kind.dump(changed(kind.tree, path, lambda node: {**node, draw(st.text(max_size=4)): value}))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["token manifest", "checkpoint manifest", "checkpoint state", "model config", "preset", "task", "sweep"]
)
@settings(
    max_examples=40, phases=[Phase.explicit, Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_a_file_that_says_anything_is_refused_or_means_the_same(
    name: str, kinds: dict[str, Kind], data: st.DataObject
) -> None:
    kind = kinds[name]
    content = data.draw(contents(kind))
    kind.file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    try:
        found = kind.read()
    except MetaTokensError as error:
        refusal = error
    else:
        assert found == kind.expected
        return
    finally:
        kind.file.write_text(kind.dump(kind.tree))
    assert refusal.exit_code in kind.exit_codes
    assert len(str(refusal).splitlines()) == 1
    assert not [character for character in str(refusal) if unicodedata.category(character) == "Cc"]
