"""Where parameters, gradients and optimizer state are: one interface, one class per library.

A strategy wraps the model, owns the optimizer, and gives checkpoints whole tensors, so that a
checkpoint says nothing about the strategy that wrote it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavis.common import dist
from lavis.common.device import warn_of_emulation
from lavis.common.errors import ConfigError
from lavis.common.schema import RunConfig
from lavis.common.types import DTYPES
from lavis.models.weights.slices import own_rows, replace_parameters, take_out

if TYPE_CHECKING:
    from lavis.models.vlm import VLM

Groups = list[dict[str, Any]]


class Strategy:
    """Everything in one process.

    Attributes:
        module: what is called in place of the model.
        optimizer: AdamW over the trainable parameters.
        shards: whether frozen parameters are sharded, too; then the model may be a mapped one.
        keeps_packed: whether a language model's weights may be packed in few bits.
    """

    shards: bool = False
    keeps_packed: bool = True

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.device = run, device
        self.dtype = DTYPES[run.autocast_dtype]
        if run.amp and dist.is_main():
            warn_of_emulation(device, self.dtype, "run.autocast_dtype")
        fp16 = run.amp and self.dtype == torch.float16 and run.loss_scale
        self.rescales = fp16  # whether an infinite gradient is part of finding the loss scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def setup(self, model: nn.Module, groups: Groups) -> None:
        """Take over a model and its trainable parameters, grouped.

        Raises:
            ConfigError: autocast does not fit the model.
        """
        self.check_autocast(model)
        names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        named = [[names[p] for p in g["params"]] for g in groups]
        del names
        self.module: Any = self.wrap(model)
        wrapped = dict(model.named_parameters())  # sharding puts others in their place
        params = [[wrapped[n] for n in group] for group in named]
        groups = [g | {"params": p} for g, p in zip(groups, params, strict=True)]
        self.trained = [p for g in groups for p in g["params"]]
        self.optimizer: Any = self.adamw(groups, self.run.init_lr)

    def check_autocast(self, model: nn.Module) -> None:
        """Refuse to compute a frozen language model in another half precision than its own.

        Autocast would keep a second copy of all its weights.
        """
        head = getattr(getattr(model, "language", None), "head", None)
        if not self.run.amp or head is None or head.weight.requires_grad:
            return
        names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        own = names.get(head.weight.dtype)
        if own and own != names[self.dtype]:
            raise ConfigError(
                f"run.autocast_dtype is {names[self.dtype]}, but the frozen language model is in "
                f"{own}: with run.amp its weights would be in memory twice; "
                f"set run.autocast_dtype: {own}, or run.amp: false"
            )

    def adamw(self, groups: Groups, lr: float) -> torch.optim.AdamW:
        """Loshchilov and Hutter 2019, as the run sets it."""
        betas = self.run.beta1, self.run.beta2
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=self.run.eps)

    def wrap(self, model: nn.Module) -> Any:
        """What is called in place of the model."""
        return model

    def prove(self, model: VLM) -> None:
        """Find out what its language model can do, if that had to wait for :meth:`setup`."""
        model.prove_language(self.device)

    def reserved(self) -> float:
        """Bytes of a device, free after :meth:`setup`, that steps need beside activations."""
        return 0.0

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
        return float(self.whole(nn.utils.clip_grad_norm_(self.trained, limit)))

    def step(self) -> None:
        """Move the parameters and forget the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which processes hold slices. Every process must call it."""
        return tensor.detach()

    def full(self, tensor: Tensor) -> Tensor:
        """A whole tensor on the CPU, for the main process; the others, which write no file, get
        one without numbers. Every process must call it."""
        return self.whole(tensor).to("cpu" if dist.is_main() else "meta")

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


def unchanged_blocks(model: nn.Module) -> set[nn.Module]:
    """Blocks of a frozen vision encoder that autocast leaves alone."""
    vision = getattr(model, "vision", None)
    return set(vision.blocks()) if vision is not None and vision.keeps_precision else set()


def gathered_at_once(model: nn.Module, dtype: torch.dtype | None, *, gradients: bool = True) -> int:
    """Bytes of whole parameters in use and on their way while :class:`FSDP2Strategy` computes.

    Args:
        dtype: of the products; ``None``: as the parameters are.
        gradients: also those of what learns, before and while they are added up in fp32.
    """

    def size(parameter: nn.Parameter) -> int:
        each = dtype.itemsize if dtype else parameter.itemsize
        learns = gradients and parameter.requires_grad
        return parameter.numel() * (2 * each + 4 if learns else each)

    def whole(module: nn.Module) -> int:
        return sum(map(size, module.parameters()))

    blocks = [0, *map(whole, getattr(model, "shardable_blocks", list)())]
    return whole(model) - sum(blocks) + 2 * max(blocks)  # one is in use, one on its way


class FSDP2Strategy(Strategy):
    """Every process holds a slice of every parameter (``fully_shard``, Zhao et al. 2023).

    The blocks that ``model.shardable_blocks`` lists are gathered one by one when they are used;
    frozen blocks are sharded, too. ``run.fsdp_cpu_offload`` keeps the slices in main memory.
    Packed weights are buffers, of which every process holds the whole on its device.
    Gradients are sharded after every micro-batch: added up whole, those of a language model that
    learns would fill a card.
    """

    shards = True

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

        held = take_out(model)
        model.uniform_graph = model.sharded = True  # type: ignore[assignment]
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
        stored = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        self._at_once = gathered_at_once(model, self.dtype if self.run.amp else None)
        unchanged = unchanged_blocks(model)
        for block in getattr(model, "shardable_blocks", list)():
            # Gathered in half precision where autocast would compute in it anyway. Adapters beside
            # frozen weights of that precision are not: they are computed in fp32.
            frozen = {p.dtype for p in block.parameters() if not p.requires_grad}
            policy = stored if frozen == {self.dtype} else half
            policy = MixedPrecisionPolicy() if block in unchanged else policy
            fully_shard(block, mp_policy=policy, **options)
        fully_shard(model, **options)
        replace_parameters(model, lambda name, parameter: self.shard(held[name], parameter))
        for method in ("generate_ids", "encode_query", "prove_language"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        return model

    def prove(self, model: VLM) -> None:
        # Blocks compute in half precision under autocast, whatever their slices are.
        model.prove_language(self.device, self.dtype if self.run.amp else None)
        model.reshard()  # type: ignore[operator]  # else what is outside of blocks stays gathered

    def reserved(self) -> float:
        if self.run.fsdp_cpu_offload:
            return float(self._at_once)
        local = sum(p.to_local().nbytes for p in self.trained)
        return float(self._at_once + 3 * local)  # a gradient and two moments

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return super().whole(tensor.to(self.device).full_tensor())  # type: ignore[attr-defined]
        return super().whole(tensor)

    def shard(self, value: Any, parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import DTensor

        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            return value
        assert isinstance(parameter, DTensor)
        place = "cpu" if self.run.fsdp_cpu_offload else self.device
        rows = own_rows(value, dist.rank(), dist.world_size())
        return DTensor.from_local(
            rows.to(place, parameter.dtype, copy=True),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
