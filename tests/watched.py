"""What a computation asks of its device, seen from below autograd: host reads, copies to it, tensors, memory."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what a view of another tensor is made by writes nothing
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2"}


class Watched(TorchDispatchMode):
    """Notes every operation inside of the block.

    The device "meta" stands for an accelerator: a tensor there has no values, so whatever waits for one must come
    through here. A read is answered with `answer`, as if every number on the device were that.
    """

    def __init__(self, answer: int = 0) -> None:
        """Count nothing yet."""
        super().__init__()
        self.answer = answer
        self.reads: list[str] = []
        """Operations that wait for the device."""
        self.copies: list[str] = []
        """Operations that copy from the host to the device, which waits too unless memory is pinned."""
        self.written: Counter[tuple[str, tuple[int, ...]]] = Counter()
        """Outputs that are no views, by operation and shape."""
        self.largest = 0
        """Elements of the largest tensor that was made."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation and run it."""
        del types
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in given)
        to = torch.device(kwargs.get("device") or "meta")
        if on_device and (name in _READS or (name == "_to_copy" and to.type == "cpu")):
            self.reads.append(name)
            return torch.full(given[0].shape, self.answer) if name == "_to_copy" else self.answer
        if not on_device and given and name == "_to_copy" and to.type == "meta" and "device" in kwargs:
            self.copies.append(name)
        made = operation(*args, **kwargs)
        if not operation.is_view:
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self.written[name, tuple(tensor.shape)] += 1
                    self.largest = max(self.largest, tensor.numel())
        return made


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside of the block made and that are still held."""

    def __init__(self) -> None:
        """Count nothing yet."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        del types
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _release(self, number: int) -> None:
        self.now -= number
