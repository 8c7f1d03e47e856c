"""How the processes of a run share its model; `metatokens.training.parallel` has a class for each."""

from typing import Annotated, Literal

from pydantic import Field

from metatokens.config.base import Frozen


class Single(Frozen):
    """One process alone; several are refused."""

    kind: Literal["single"] = "single"


class Ddp(Frozen):
    """Each process holds the whole model and averages the gradients; alone it is a run like any other."""

    kind: Literal["ddp"] = "ddp"


class Fsdp2(Frozen):
    """Each process holds a part of every parameter, gradient and moment (torch's `fully_shard`)."""

    kind: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    """Let a block's parameters go after its forward pass and gather them again for the backward pass; off needs more
    memory and communicates less."""


Parallel = Annotated[Single | Ddp | Fsdp2, Field(discriminator="kind")]
