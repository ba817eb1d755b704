"""FSDP2 at real size without a card: a group of processes that are not there, tensors without data.

``python -m tests.runners.fake_group`` prints what the recipes take, in GiB of a card.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import ref

import torch
import torch.distributed.fsdp._fully_shard as sharding
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lavis.common.schema import RunConfig
from lavis.models import MiniGPT4QwenConfig
from lavis.models.build import MiniGPT4Qwen
from lavis.models.compute.masks import Documents
from lavis.models.compute.schedule import StepSchedule
from lavis.models.vlm import VLM
from lavis.runners.strategy import FSDP2Strategy
from tests.conftest import REPO

SIZES = {
    "7b": {},  # Qwen-7B-Chat is the default
    "14b": {
        "hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 40,
        "num_attention_heads": 40, "vocab_size": 152064, "seq_length": 2048,
    },
}  # fmt: skip


class Ledger(TorchDispatchMode):
    """Counts collectives, and the most bytes of a device that were alive after any operation."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.peak, self.collectives = device, 0, Counter[str]()
        self._storages: dict[int, ref[torch.UntypedStorage]] = {}

    def ignore(self, tensors: Any) -> None:
        """Leave out what is no allocation of this device: mapped files."""
        self._files = [t.untyped_storage() for t in tensors]
        self._ignored = {s._cdata for s in self._files}

    def alive(self) -> int:
        """Bytes now."""
        return sum(s.nbytes() for r in self._storages.values() if (s := r()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives[func._opname.strip("_")] += 1
        new = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in new:
            if tensor.device.type == self.device:
                self._add(tensor.untyped_storage())
        if new:
            self.peak = max(self.peak, self.alive())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        raise NotImplementedError
