"""Where parameters, gradients and optimizer state are: one interface, one class per library.

A strategy wraps the model, owns the optimizer, and gives checkpoints whole tensors, so that a
checkpoint says nothing about the strategy that wrote it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lavis.common import dist
from lavis.common.device import warn_of_emulation
from lavis.common.errors import ConfigError
from lavis.common.schema import RunConfig
from lavis.common.types import DTYPES

Groups = list[dict[str, Any]]


class Strategy:
    """Everything in one process.

    Attributes:
        module: what is called in place of the model.
        optimizer: AdamW over the trainable parameters.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.device = run, device
        self.dtype = DTYPES[run.autocast_dtype]
        if run.amp and dist.is_main():
            warn_of_emulation(device, self.dtype, "run.autocast_dtype")
        fp16 = run.amp and self.dtype == torch.float16 and run.loss_scale
        self.rescales = fp16  # whether an infinite gradient is part of finding the loss scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def setup(self, model: nn.Module, groups: Groups) -> None:
        """Take over a model and its trainable parameters, grouped."""
        names = {p: n for n, p in model.named_parameters()}
        self.module: Any = self.wrap(model)
        wrapped = dict(model.named_parameters())  # sharding puts others in their place
        groups = [g | {"params": [wrapped[names[p]] for p in g["params"]]} for g in groups]
        self.trained = [p for g in groups for p in g["params"]]
        self.optimizer: Any = self.adamw(groups, self.run.init_lr)

    def adamw(self, groups: Groups, lr: float) -> torch.optim.AdamW:
        """Loshchilov and Hutter 2019, as the run sets it."""
        betas = self.run.beta1, self.run.beta2
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=self.run.eps)

    def wrap(self, model: nn.Module) -> Any:
        """What is called in place of the model."""
        return model

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; ``last`` of its step."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.run.amp):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add gradients of this process's share of the step's loss."""
        self.scaler.scale(loss * dist.world_size()).backward()  # libraries average over processes

    def clip(self) -> float:
        """Clip the gradient to ``run.grad_norm_clip``. Returns its norm before, over everything."""
        self.scaler.unscale_(self.optimizer)
        limit = self.run.grad_norm_clip or math.inf
        return float(self.full(nn.utils.clip_grad_norm_(self.trained, limit)))

    def step(self) -> None:
        """Move the parameters and forget the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def full(self, tensor: Tensor) -> Tensor:
        """A whole tensor on the CPU. Every process must call it."""
        return tensor.detach().cpu()

    def optimizer_state(self) -> dict[str, Any]:
        """PyTorch's state dict of the optimizer, with whole tensors. Every process must call it."""
        state = self.optimizer.state_dict()
        whole = {
            i: {k: self.full(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
            for i, entries in state["state"].items()
        }
        return {"state": whole, "param_groups": state["param_groups"]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`optimizer_state` gave, on any strategy.

        Learning rates, decay and betas stay as the configuration says.

        Raises:
            ValueError, KeyError, TypeError: the state belongs to other parameters.
        """
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        sharded = {
            i: {k: self.shard(v, self.trained[i]) for k, v in entries.items()}
            for i, entries in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": sharded})
        for group, chosen in zip(self.optimizer.param_groups, options, strict=True):
            group.update(chosen)  # the configuration decides, and the original has no lr_scale

    def shard(self, value: Any, parameter: nn.Parameter) -> Any:
        """This process's part of a whole optimizer tensor."""
        return value


class DDPStrategy(Strategy):
    """A copy of the model in every process; gradients are averaged once a step."""

    def wrap(self, model: nn.Module) -> Any:
        model.uniform_graph = True  # type: ignore[assignment]
        # All processes have loaded the same weights: nothing needs to be sent around first.
        return nn.parallel.DistributedDataParallel(
            model, init_sync=False, forward_sync_buffers=False
        )

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        quiet = contextlib.nullcontext() if last else self.module.no_sync()
        with quiet, super().micro_batch(last=last):
            yield


class FSDP2Strategy(Strategy):
    """Every process holds a slice of every parameter (``fully_shard``, Zhao et al. 2023).

    The blocks that ``model.shardable_blocks`` lists are gathered one by one when they are used;
    frozen blocks are sharded, too. ``run.fsdp_cpu_offload`` keeps the slices in main memory.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        super().__init__(run, device)
        if self.scaler.is_enabled():
            raise ConfigError("run.strategy: fsdp2 needs run.autocast_dtype: bf16, not fp16")

    def wrap(self, model: nn.Module) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        model.uniform_graph = True  # type: ignore[assignment]
        kind = self.device.type
        mesh = init_device_mesh(kind, (dist.world_size(),))
        slices = (
            CPUOffloadPolicy(pin_memory=kind == "cuda")
            if self.run.fsdp_cpu_offload
            else OffloadPolicy()
        )
        options: dict[str, Any] = {"mesh": mesh, "offload_policy": slices}
        half = MixedPrecisionPolicy(
            param_dtype=self.dtype if self.run.amp else None, reduce_dtype=torch.float32
        )
        for block in getattr(model, "shardable_blocks", list)():
            # Gathered in half precision where autocast would compute in it anyway.
            fully_shard(block, mp_policy=half, **options)
        fully_shard(model, **options)
        for method in ("generate_ids", "encode_query"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        return model

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)
        with super().micro_batch(last=last):
            yield

    def full(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return super().full(tensor.to(self.device).full_tensor())  # type: ignore[attr-defined]
        return super().full(tensor)

    def shard(self, value: Any, parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            return value
        assert isinstance(parameter, DTensor)
        value = value.to(parameter.device, copy=True)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
