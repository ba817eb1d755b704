"""A GPU without a card: what is on it has shapes and no numbers, what is on the host is real.

So every index that the host computes is the right one, and models of real size take no memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.cuda.amp.common as amp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lavis.models.weights.slices import replace_parameters

aten = torch.ops.aten
_MATH = F.scaled_dot_product_attention
# What autocast lowers to half precision, and what it raises to fp32.
_HALF = {
    F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
_FULL = {
    F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, torch.softmax,
    torch.log_softmax, Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt,
    Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log, Tensor.sum, torch.sum,
}  # fmt: skip


class FakeCuda(TorchDispatchMode):
    """While it is entered, ``cuda`` is such a device.

    Attributes:
        live: bytes on the device.
        peak: the most there were.
        pinned: storages of the host that copies need not wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode()
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.peak = 0

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """Autocast, also around a backward pass."""
        with torch.autocast("cuda", dtype), _Casts(dtype):
            yield

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.live

    def __enter__(self) -> FakeCuda:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._fake)
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", _fused))
            # Without a card autocast would not start.
            stack.enter_context(patch.object(amp, "amp_definitely_not_available", lambda: False))
            stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda: True))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # PyTorch's own C++ asks, Python has asked the tensor. The engine of the backward pass
            # would look for the card's streams; autocast finds nothing to cast (see `_Casts`).
            return torch.device("meta")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        if target.type == "meta":  # C++ makes a tensor beside another one
            kwargs, target = kwargs | {"device": torch.device("cuda")}, torch.device("cuda")
        if target.type != "cuda" and not any(isinstance(t, FakeTensor) for t in tensors):
            return self._on_host(func, args, kwargs)
        return self.on_device(func, args, kwargs, tensors)

    def _on_host(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            if func is aten.is_pinned.default:
                return args[0].untyped_storage() in self.pinned
            if func is not aten._pin_memory.default:
                return func(*args, **kwargs)
            pinned = args[0].clone()
            self.pinned.add(pinned.untyped_storage())
            return pinned

    def on_device(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Compute the shape of an operation of the device; ``tensors`` are all that it reads."""
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        if func is aten.is_pinned.default:
            return False
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            with unset_fake_temporarily():
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.ones(args[0].shape, dtype=dtype) * dtype.is_floating_point
        if any(not isinstance(t, FakeTensor) for t in tensors):
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._keep_account(tensor)
        return out

    def _as_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_meta:
            return torch.empty_like(tensor, device="cuda")
        with unset_fake_temporarily():
            return self._fake.from_tensor(tensor)

    def _keep_account(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage in self._storages:
            return
        self._storages.add(storage)
        size = -(-storage.nbytes() // 512) * 512  # as the caching allocator rounds
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


class _Casts(TorchFunctionMode):
    """What autocast does to the card's tensors, in operations that Python calls: its C++ would have
    to know their device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[Tensor, Tensor] = {}  # that learn: cast once

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = self._dtype if func in _HALF else torch.float32 if func in _FULL else None
        if wanted is not None and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map_only(Tensor, lambda t: self._cast(t, wanted), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, wanted: torch.dtype) -> Tensor:
        half = {torch.float32, torch.float16, torch.bfloat16}
        if tensor.dtype == wanted or tensor.dtype not in half or tensor.device.type != "cuda":
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(wanted)
        if tensor not in self._weights:
            self._weights[tensor] = tensor.to(wanted)
        return self._weights[tensor]


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that PyTorch takes on a card, which it would ask."""
    if query.device.type != "cuda":
        return _MATH(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if query.dtype != torch.float32 and attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    efficient = aten._scaled_dot_product_efficient_attention
    learns = query.requires_grad or key.requires_grad or value.requires_grad
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = hidden.masked_fill_(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return efficient(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


def on_card(model: nn.Module) -> None:
    """Give a model of the meta device memory on the card; call it while the card is there."""
    replace_parameters(model, lambda _, p: torch.empty(p.shape, dtype=p.dtype, device="cuda"))
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
