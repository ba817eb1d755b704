"""DeepSpeed's ZeRO (Rajbhandari et al. 2020), configured by the YAML's ``run.deepspeed_config``."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lavis.common import dist
from lavis.common.errors import ConfigError
from lavis.common.schema import RunConfig
from lavis.models.weights.files import final_dtype
from lavis.runners.strategy import Groups, Strategy

logger = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedStrategy(Strategy):
    """ZeRO 0 to 3: what is sharded is DeepSpeed's matter; steps, rates and files are the runner's.

    Frozen parameters are sharded by stage 3 alone.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        super().__init__(run, device)
        given = dict(run.deepspeed_config or {})
        given.pop("optimizer", None)  # the runner's
        whole = run.batch_size_train * run.accum_grad_iters * dist.world_size()
        if given.pop("train_batch_size", "auto") not in ("auto", None, whole):
            raise ConfigError(
                "run.deepspeed_config.train_batch_size is not the batch_size_train * "
                f"accum_grad_iters * processes of this run, {whole}; remove it"
            )
        self.deepspeed_config = given | {
            "train_micro_batch_size_per_gpu": run.batch_size_train,
            "gradient_accumulation_steps": 1,  # the runner says where a step ends
            "gradient_clipping": run.grad_norm_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        try:
            _import_deepspeed(device).DeepSpeedConfig(self.deepspeed_config)
        except Exception as error:  # assertions, pydantic's and others
            reason = " ".join(str(error).split("\n    For further")[0].split())
            raise ConfigError(f"run.deepspeed_config: DeepSpeed refuses it: {reason}") from error
        zero = run.deepspeed("zero_optimization")
        self.stage = int(zero.get("stage", 0))
        self.shards = self.stage == 3
        self.keeps_packed = not self.shards
        fp16, bf16 = (bool(run.deepspeed(kind).get("enabled")) for kind in ("fp16", "bf16"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.rescales = fp16  # by DeepSpeed
        if run.on_nonfinite == "skip" and self.stage > 0:
            raise ConfigError(
                "run.on_nonfinite: skip does not work with ZeRO stages above 0, which have merged "
                "a gradient before it can be taken back; use on_nonfinite: error or strategy: fsdp2"
            )
        self._half = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
        if self.stage == 0 and self._half:
            # Of a half-precision stage 0 DeepSpeed does not hand out whole moments.
            logger.info("ZeRO stage 0 in half precision runs as stage 1: the same numbers")
            self.stage = 1
            self.deepspeed_config["zero_optimization"] = zero | {"stage": 1}

    def setup(self, model: nn.Module, groups: Groups) -> None:
        deepspeed = _import_deepspeed(self.device)
        if not self._half:
            self.check_autocast(model)
        model.uniform_graph = True  # type: ignore[assignment]
        model.sharded = self.stage == 3  # type: ignore[assignment]
        self.trained = [p for g in groups for p in g["params"]]
        self._group_sizes = [len(g["params"]) for g in groups]
        # What half precision would round, the optimizer gets as it was.
        kinds = {p: final_dtype(p) for p in self.trained}
        exact = {p: p.detach().float().cpu().clone() for p, k in kinds.items() if k != self._half}
        if self.shards:
            self._cut(model)
        # DeepSpeed takes a trial step to lay out its buffers; at rate 0 it moves nothing.
        self._inner = self.adamw(groups, 0.0)
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._inner,
            config=self.deepspeed_config,
            dist_init_required=False,
        )
        self._lay_out_state()
        if self._half:  # the model is in half precision now; the optimizer keeps full copies
            _cast_buffers(model)
            for parameter, value in exact.items():
                deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(self.device))

    def _cut(self, model: nn.Module) -> None:
        """Partition the parameters of a model, which may be a mapped one: each process copies its
        slices. Left to DeepSpeed, each would copy the whole, and be sent the first one's."""
        from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

        device, half = self.device, self._half

        class Slices(Init):
            def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
                for parameter in param_list:
                    if not is_zero_param(parameter):
                        parameter.data = parameter.data.to(half or final_dtype(parameter))
                        self._convert_to_deepspeed_param(parameter)
                        parameter.partition()
                        parameter.data = parameter.data.to(device)  # empty now

        Slices(module=model, config_dict_or_path=self.deepspeed_config, dtype=half or torch.float32)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    def reserved(self) -> float:
        # Whole parameters, as many as ZeRO-3 keeps, and slices of the gradient in fp32.
        most = self.module._config.zero_config.max_live_parameters
        whole = min(most, sum(p.ds_numel for p in self.module.parameters()))
        each = self._half or torch.float32
        return float(whole * each.itemsize + sum(4 * p.ds_tensor.numel() for p in self.trained))

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(is_boundary=last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.run.amp and not self._half):
            yield

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss * dist.world_size())

    def clip(self) -> float:
        """The gradient's norm; DeepSpeed clips when it steps."""
        from deepspeed.utils import safe_get_full_grad

        grads = (safe_get_full_grad(p) for p in self.trained)
        norms = [torch.linalg.vector_norm(g.float()) for g in grads if g is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def step(self) -> None:
        self.module.step()

    def zero_grad(self) -> None:
        self.module.optimizer.zero_grad()

    def whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if isinstance(tensor, nn.Parameter):
            exact = safe_get_full_fp32_param(tensor)
            if exact is not None:
                return super().whole(exact)
            if hasattr(tensor, "ds_id"):
                with GatheredParameters([tensor]):
                    return super().whole(tensor).clone()
        return super().whole(tensor)

    def optimizer_state(self) -> dict[str, Any]:
        if self.stage == 0:
            return super().optimizer_state()
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next((s["step"] for s in self._inner.state.values() if "step" in s), None)
        state = {}
        if step is not None and float(step) > 0:
            for i, p in enumerate(self.trained):
                moments = {k: safe_get_full_optimizer_state(p, k) for k in _MOMENTS}
                state[i] = {k: self.full(v) for k, v in moments.items()}
                state[i]["step"] = torch.tensor(float(step))
        numbers = iter(range(len(self.trained)))
        groups = [
            group | {"params": list(islice(numbers, size))}
            for group, size in zip(self._inner.param_groups, self._group_sizes, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        if self.stage == 0:
            return super().load_optimizer_state(state)
        from deepspeed.utils import safe_set_full_optimizer_state

        if len(state["state"]) not in (0, len(self.trained)):
            raise ValueError(f"{len(state['state'])} parameters, not {len(self.trained)}")
        for i, p in enumerate(self.trained):
            for k in _MOMENTS if i in state["state"] else ():
                safe_set_full_optimizer_state(p, state["state"][i][k].to(self.device), k)
        if state["state"]:
            self._set_step(float(state["state"][0]["step"]))
        return None

    def _lay_out_state(self) -> None:
        """Make the moments now, so that they can be set and read before a step.

        Left alone, ZeRO 1 and 2 link parameters to them in the first step of the first group, when
        the other groups have none yet.
        """
        self._set_step(0)  # of those that a trial step has made
        zero = self.module.optimizer
        flats = (
            getattr(zero, "single_partition_of_fp32_groups", [])  # stages 1 and 2
            or getattr(zero, "fp32_partitioned_groups_flat", [])  # stage 3
        )
        for flat in flats:
            moments = {k: torch.zeros_like(flat) for k in _MOMENTS}
            self._inner.state[flat] = {"step": torch.tensor(0.0), **moments}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    def _set_step(self, step: float) -> None:
        for entries in self._inner.state.values():
            if "step" in entries:
                entries["step"] = torch.full_like(torch.as_tensor(entries["step"]), step)


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # started without a launcher
    import deepspeed

    if device.type == "cpu":
        # Its all-reduce through shared memory would be compiled at first use; gloo has one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _cast_buffers(model: nn.Module) -> None:
    """Bring buffers to the precision of the parameters beside them, which DeepSpeed leaves out."""
    for module in model.modules():
        parameter = next(module.parameters(recurse=False), None)
        for name, buffer in module.named_buffers(recurse=False):
            if parameter is not None and buffer.is_floating_point():
                setattr(module, name, buffer.to(parameter.dtype))
