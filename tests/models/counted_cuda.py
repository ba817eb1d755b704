"""A card without numbers that counts what a step asks of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lavis.models.compute.fake_cuda import FakeCuda

aten = torch.ops.aten
_NO_KERNEL = {
    aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.alias.default,
    aten.empty_strided.default, aten.new_empty.default, aten.lift_fresh.default,
    aten.new_empty_strided.default, aten._unsafe_view.default,
}  # fmt: skip
_COPIES = {aten._to_copy.default, aten.copy_.default}


class CountedCuda(FakeCuda):
    """Counts from :meth:`restart` on.

    Attributes:
        blocks: where the host waited for the device: copies between the two that are not from
            pinned memory, and numbers asked for, by operation.
        kernels: operations of the device that compute something, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._records = False
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.blocks: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While a CUDA graph is recorded: copies from pinned memory block, too."""
        self._records = True
        try:
            yield
        finally:
            self._records = False

    def on_device(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        name = func.overloadpacket.__name__
        if func is aten._local_scalar_dense.default:
            self.blocks[name] += 1
        elif func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.blocks["to the host"] += 1
        elif func is not aten.is_pinned.default:
            if self._waits(func, args, kwargs, tensors):
                self.blocks[f"{name} from the host"] += 1
            if func not in _NO_KERNEL and not func.is_view:
                self.kernels[name] += 1
        return super().on_device(func, args, kwargs, tensors)

    def _waits(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
        host = [t for t in tensors if not isinstance(t, FakeTensor) and t.ndim]
        wait = not (
            kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        )
        return bool(host) and (
            func not in _COPIES
            or wait
            or self._records  # would be what it was then at every replay
            or any(t.untyped_storage() not in self.pinned for t in host)
        )
