"""What a replication takes, computed from its files before anything runs.

Models and tokens that earlier commands make are counted by their shape, so the cost of all parts is known at the start,
and every sweep is checked as a dry run of it would be. Trainings that stop once their task is solved count with all
their steps. Starts, evaluations and the preparation of text are not counted.
"""

import posixpath
from dataclasses import dataclass, field
from pathlib import Path

from metatokens.config.finetuning import CheckpointStart, FinetuneConfig
from metatokens.config.rope import YarnScaling
from metatokens.config.schema import ModelConfig
from metatokens.config.sweep import load_sweep
from metatokens.errors import UsageError
from metatokens.replication.plan import Part, Scale
from metatokens.sweep.planning import Promised, SweepRun, plan_sweep
from metatokens.sweep.running import is_done
from metatokens.training.costs import SECONDS_PER_HOUR, UTILISATION, find_gpu


@dataclass(frozen=True)
class PartCost:
    """The trainings of a part, and what those still to do take if none ends early."""

    name: str
    question: str
    trainings: int
    to_do: int
    training_flops: float
    """Of the trainings to do."""
    hours: float
    """Of one core, or of one GPU."""


@dataclass
class _Promises:
    """The models of the parts so far, by their paths below the folder of the replication."""

    shapes: dict[str, ModelConfig] = field(default_factory=dict)

    def inside(self, folder: str) -> dict[str, ModelConfig]:
        """Return them by the paths that a command in a folder reads."""
        return {posixpath.relpath(path, folder): shape for path, shape in self.shapes.items()}

    def add_run(self, path: str, run: SweepRun, folder: str) -> None:
        config = run.config
        if not isinstance(config, FinetuneConfig):
            self.shapes[path] = config.model
        elif isinstance(config.start, CheckpointStart):
            self.shapes[path] = self.shapes[posixpath.normpath(posixpath.join(folder, config.start.path))]
        else:
            self.shapes[path] = config.start.model

    def add_extension(self, words: list[str], folder: str) -> None:
        """Note the model of an `extend` command: that of another, its window scaled by YaRN whatever else changes."""
        source, made = (posixpath.normpath(posixpath.join(folder, words[i])) for i in (1, words.index("--out") + 1))
        if source not in self.shapes:
            raise UsageError(
                " ".join(words),
                expected="a model that an earlier command makes",
                found=source,
                remedy="correct the plan",
            )
        shape, factor = self.shapes[source], float(words[words.index("--factor") + 1])
        window = shape.max_position_embeddings
        scaling = YarnScaling(factor=factor, original_max_position_embeddings=window)
        self.shapes[made] = shape.model_copy(
            update={"max_position_embeddings": round(window * factor), "rope_scaling": scaling}
        )


def estimate(scale: Scale, out: Path, *, gpu: str | None = None, utilisation: float = UTILISATION) -> list[PartCost]:
    """Check every sweep of a scale and return what its parts take.

    Args:
        scale: all its parts are planned, since later ones start from the models of earlier ones.
        out: folder of the replication, which need not exist; finished trainings there are not counted.
        gpu: the kind of GPU; off means that of the plan, which may be CPU cores.
        utilisation: share of the GPU's peak that training reaches.

    Raises:
        UsageError: a sweep or a command does not fit.
    """
    kind = gpu or scale.plan.gpu
    rate = scale.plan.operations_per_core_second
    if kind is not None:
        rate = find_gpu(kind).bfloat16_flops * utilisation
    promises = _Promises()
    costs = []
    for part in scale.plan.parts:
        runs = _plan_part(scale, part, out, promises)
        to_do = [run for run in runs if not is_done(run)]
        flops = sum(run.budget.training_flops for run in to_do)
        hours = (scale.plan.seconds_per_step * sum(run.budget.steps for run in to_do) + flops / rate) / SECONDS_PER_HOUR
        costs.append(PartCost(part.name, part.question, len(runs), len(to_do), flops, hours))
    return costs


def _plan_part(scale: Scale, part: Part, out: Path, promises: _Promises) -> list[SweepRun]:
    runs = []
    for words, _, _ in scale.commands(part):
        if words[0] == "extend":
            promises.add_extension(words, part.folder)
        if words[0] != "sweep":
            continue
        file, name = words[1], words[words.index("--out") + 1]
        promised = Promised(promises.inside(part.folder), scale.plan.text_vocab_size)
        planned = plan_sweep(load_sweep(file), out / part.folder / name, file, promised=promised)
        for run in planned:
            made = run.folder.path.relative_to(out).as_posix()
            promises.add_run(posixpath.normpath(made), run, part.folder)
        runs += planned
    return runs
