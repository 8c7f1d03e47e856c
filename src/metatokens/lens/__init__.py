"""Read and change what a model computes, by name and by position; see `metatokens.lens.lens`."""

from metatokens.lens import edits
from metatokens.lens.lens import Lens

__all__ = ["Lens", "edits"]
