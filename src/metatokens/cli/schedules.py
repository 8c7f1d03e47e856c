"""The flags that say where meta-tokens stand in what a model generates."""

import argparse
from typing import Any

from metatokens.cli.arguments import at_least, share
from metatokens.errors import UsageError


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the schedule."""
    parser.add_argument(
        "--schedule",
        choices=("none", "periodic", "uniform"),
        help="where meta-tokens stand; by default as the model's generation config says, else periodic",
    )
    parser.add_argument("--every", type=at_least(1), help="periodic: text tokens between meta-tokens (9)")
    parser.add_argument("--ratio", type=share, help="uniform: probability of a meta-token at each position (0.1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of sampling and of the uniform schedule")


def schedule_of(options: argparse.Namespace, generation_config: Any) -> Any:
    """Return the schedule that the flags of `add_schedule` set; `--every` and `--ratio` imply their kinds.

    Raises:
        UsageError: for a flag that does not belong to the kind.
    """
    from metatokens.model.schedule import NoSchedule, PeriodicSchedule, UniformSchedule, read_schedule

    kind = options.schedule
    for name, its_kind in (("every", "periodic"), ("ratio", "uniform")):
        if getattr(options, name) is not None:
            if kind not in (None, its_kind):
                raise UsageError(
                    f"--{name}",
                    expected=f"the schedule {its_kind}",
                    found=f"the schedule {kind}",
                    remedy=f"leave out --{name}, or take --schedule {its_kind}",
                )
            kind = its_kind
    if kind == "none":
        return NoSchedule()
    if kind == "uniform":
        return UniformSchedule(0.1 if options.ratio is None else options.ratio, options.seed)
    stated = None if kind else read_schedule(getattr(generation_config, "meta_schedule", None))
    return stated or PeriodicSchedule(options.every or 9)
