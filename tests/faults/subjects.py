"""What is harmed: folders as the package leaves or takes them, how they are read, and how a refusal ends.

A new kind of file is one entry of `SUBJECTS`.
"""

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as arrow
import zstandard
from campaign import Case
from kills import config_of, whole
from pyarrow import parquet
from small_corpus import prepare_corpus

from metatokens import pretrain
from metatokens.analysis.results import read_results, write_results
from metatokens.config.loading import to_yaml
from metatokens.config.schema import PretrainConfig
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.data.tokenizer import load_text_tokenizer
from metatokens.errors import DataError
from metatokens.report.sweep_results import RESULTS_FORMAT, FailedRun, SweepResults, load_results, to_json
from metatokens.storage import write_sealed
from metatokens.training.checkpoint import find_checkpoint, load_checkpoint, read_state, step_folders
from metatokens.training.loading import ModelFolder
from metatokens.training.optimizer import build_optimizer
from synthetic_results import build_results

SPEEDS = ("run", "model", "text_tokens_per_second", "meta_tokens_per_second", "waited_for_batches")


@dataclass(frozen=True)
class Subject:
    """One kind of folder."""

    make: Callable[[Case, Path, int], object]
    """Makes the folder; variant 1 has files of the same names with another content."""
    read: Callable[[Case, Path], Any]
    """Returns the content in a form that can be compared, by the functions that the commands use."""
    codes: frozenset[int]
    """The exit codes that a refusal may have."""
    command: tuple[str, ...] = ()
    """A command that reads the folder `{}`, and so must refuse it with the same code."""
    spares: tuple[str, ...] = ("README.md",)
    """Patterns of files of which nothing is kept that they could be compared with, or that are for people alone."""
    is_closed: bool = True
    """Whether something says which files belong to it. Otherwise one that is gone, or that another whole file has
    replaced, is the user's own change, and no harm."""


def make_tokens(case: Case, folder: Path, variant: int) -> None:
    del case
    place = folder.with_name(f"{folder.name}-made")
    place.mkdir()
    prepare_corpus(place, num_documents=40 + variant, vocab_size=300).rename(folder)


def read_tokens(case: Case, folder: Path) -> Any:
    del case
    with TokenDataset.open(folder) as dataset:
        ids = [dataset.read(split, 0, dataset.num_tokens(split)).tobytes() for split in ("train", "validation")]
        return dataset.manifest, ids, dataset.tokenizer().to_str()


def make_checkpoint(way: str) -> Callable[[Case, Path, int], object]:
    def make(case: Case, folder: Path, variant: int) -> object:
        newest_first = step_folders(whole(case, way) / "checkpoints")
        return shutil.copytree(newest_first[variant], folder / newest_first[0].name)

    return make


def read_checkpoint(case: Case, folder: Path) -> Any:
    path = find_checkpoint(folder)
    assert path is not None, "takes a damaged checkpoint for none, so that a run would begin anew"
    model = ModelFolder(path).open_model()
    optimizer = build_optimizer(model, PretrainConfig().optimizer)
    load_checkpoint(path, model, optimizer)
    moments = {name: as_bytes(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    return read_state(path), read_model(case, path), moments


def as_bytes(tensors: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def trained(case: Case, variant: int = 0) -> tuple[PretrainConfig, Path]:
    """Return a finished run of eight steps, and its config."""
    short = ("--training.duration.steps", "8", "--evaluation.interval_steps", "4", "--seed", str(variant))
    config, out = config_of(case, "single", *short), case.shared / f"trained-{variant}"
    if not out.exists():
        pretrain(config, out, show_progress=False)
    return config, out


def make_run(case: Case, folder: Path, variant: int) -> object:
    return shutil.copytree(trained(case, variant)[1], folder, ignore=shutil.ignore_patterns("lock"))


def read_run(case: Case, folder: Path) -> Any:
    """Give the command of the run once more; it is complete, unless a checkpoint was harmed."""
    result = asdict(pretrain(trained(case)[0], folder, show_progress=False))
    opened = ModelFolder(folder)
    measured = {key: value for key, value in result.items() if key not in SPEEDS}
    return measured, read_model(case, folder / "model"), to_yaml(opened.pretraining or PretrainConfig())


def make_model(case: Case, folder: Path, variant: int) -> object:
    return shutil.copytree(trained(case, variant)[1] / "model", folder)


def read_model(case: Case, folder: Path) -> Any:
    del case
    opened = ModelFolder(folder)
    model = opened.open_model()
    configs = [model.config.to_dict() | {"_name_or_path": ""}, model.generation_config.to_dict()]
    return as_bytes(model.state_dict()), configs, opened.tokenizer.to_str()


def read_tokenizer(case: Case, folder: Path) -> str:
    del case
    return load_text_tokenizer(str(folder)).to_str()


def make_tokenizer(case: Case, folder: Path, variant: int) -> None:
    make_model(case, folder, variant)
    for path in folder.glob("*model*"):
        path.unlink()


def make_analysis(case: Case, folder: Path, variant: int) -> None:
    del case
    results, arrays = build_results()
    write_results(folder, results.model_copy(update={"seed": variant}), {k: v + variant for k, v in arrays.items()})


def read_analysis(case: Case, folder: Path) -> Any:
    del case
    results, arrays = read_results(folder)
    return results, {name: (array.shape, array.dtype.str, array.tobytes()) for name, array in arrays.items()}


def make_sweep(case: Case, folder: Path, variant: int) -> None:
    del case
    folder.mkdir()
    failed = (FailedRun("meta-0", f"loss {variant} is not finite"),)
    results = SweepResults(RESULTS_FORMAT, {"axes": {"arm": ["meta"]}}, "arm", 3, 2, failed, {"torch": "2"}, ())
    write_sealed(folder / "results.json", to_json(results))


def read_sweep(case: Case, folder: Path) -> SweepResults:
    del case
    return load_results(folder / "results.json")


def make_sources(case: Case, folder: Path, variant: int) -> None:
    """Write the same documents in each packed form; a plain text says nothing of whether it is whole."""
    del case
    folder.mkdir()
    texts = [f"document {number} of {variant}: nobody knew why the cat sat on the mat.\n" * 8 for number in range(40)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packed[".zst"] = zstandard.ZstdCompressor(write_checksum=True).compress
    for suffix, pack in packed.items():
        (folder / f"rows.jsonl{suffix}").write_bytes(pack(rows))
        (folder / f"text.txt{suffix}").write_bytes(pack("".join(texts).encode()))
    table = arrow.table({"text": texts})
    parquet.write_table(table, folder / "rows.parquet", write_page_checksum=True, row_group_size=10)


def read_sources(case: Case, folder: Path) -> Any:
    del case
    return list(iterate_documents(str(folder), SourceOptions()))


def make_interrupted(case: Case, folder: Path, variant: int) -> None:
    """Leave a preparation that an unreadable last document has stopped, and then take the document away."""
    (folder / "text").mkdir(parents=True)
    for number in range(40):
        text = f"story {number} of {variant}: a dog ran to the far hill, and the cat sat on the mat. " * 2_000
        (folder / "text" / f"{number:02}.txt").write_text(text)
    bad = folder / "text" / "99.txt"
    bad.write_bytes(b"\xff")
    try:
        finish_preparing(case, folder)
    except DataError:
        bad.unlink()
    assert len(list((folder / ".tokens.partial").glob("*.done"))) > 2


def finish_preparing(case: Case, folder: Path) -> None:
    tokenizer = str(case.shared / "corpus" / "tokens")
    options = SourceOptions()
    prepare(
        str(folder / "text"),
        folder / "tokens",
        tokenizer=tokenizer,
        vocab_size=300,
        validation_fraction=0.2,
        shard_tokens=100_000,
        options=options,
    )


def read_interrupted(case: Case, folder: Path) -> Any:
    finish_preparing(case, folder)
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}


SUBJECTS = {
    "tokens": Subject(
        make_tokens,
        read_tokens,
        frozenset({3}),
        ("pretrain", "tiny/meta", "--data.path", "{}", "--dry-run", "--out", "{}-out"),
    ),
    "checkpoint": Subject(make_checkpoint("single"), read_checkpoint, frozenset({4}), ("verify", "{}")),
    "checkpoint in parts": Subject(make_checkpoint("fsdp2"), read_checkpoint, frozenset({4}), ("verify", "{}")),
    "run": Subject(make_run, read_run, frozenset({2, 3, 4}), spares=("README.md", "versions.json")),
    "model": Subject(make_model, read_model, frozenset({4}), ("perplexity", "{}", "{}.txt")),
    "tokenizer": Subject(make_tokenizer, read_tokenizer, frozenset({2, 4})),
    "analysis": Subject(make_analysis, read_analysis, frozenset({3}), ("report", "{}", "--out", "{}-out")),
    "sweep": Subject(make_sweep, read_sweep, frozenset({3}), ("verify", "{}"), is_closed=False),
    "packed sources": Subject(make_sources, read_sources, frozenset({3}), is_closed=False),
    "interrupted preparation": Subject(make_interrupted, read_interrupted, frozenset({3}), spares=("*.txt",)),
}
