"""How a training step is computed. Every choice gives the same loss and gradients.

``docs/fast_path.md`` explains each saving; ``benchmarks/train_step.py`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lavis.common.schema import RunConfig
from lavis.models.compute.memory import layers_to_recompute


@dataclass(frozen=True)
class StepSchedule:
    """What a step saves.

    Attributes:
        reference: save nothing, as the original: each document in a row of its own, padded to
            ``max_txt_len``; masked attention; all layers recomputed; logits of all positions.
            The other fields then say nothing.
        packed_attention: documents of a packed row attend apart, rather than over a masked square.
        prefix_cache: keys and values of the constant prefix are computed once. Takes effect on a
            frozen language model only.
        supervised_head: logits of supervised positions only, in pieces, with the hidden gradient
            computed in the forward pass.
        recompute: layers whose activations are computed again in the backward pass: ``none``,
            ``all``, or ``n`` for every n-th.
        compile: compile the language model's layers.
    """

    reference: bool = False
    packed_attention: bool = True
    prefix_cache: bool = True
    supervised_head: bool = True
    recompute: str | int = "none"
    compile: bool = False

    @classmethod
    def from_run(
        cls,
        run: RunConfig,
        model: Any,
        device: torch.device | None = None,
        reserved: float = 0,
        free: float | None = None,
    ) -> StepSchedule:
        """The schedule that ``run`` asks for.

        ``recompute: auto`` recomputes nothing unless ``model.llm_grad_ckpt`` asks for it, and then
        as few layers as the memory allows; the arguments are those of :func:`layers_to_recompute`.
        """
        recompute: str | int = run.recompute
        if recompute == "auto":
            recompute = (
                layers_to_recompute(run, model, device, reserved, free)
                if model.config.parts[2].grad_ckpt
                else "none"
            )
        return cls(
            reference=not run.fast_path,
            packed_attention=run.packed_attention,
            prefix_cache=run.prefix_cache,
            supervised_head=run.supervised_head,
            recompute=recompute,
            compile=run.compile,
        )

    @property
    def recompute_every(self) -> int:
        """n, where every n-th layer is computed again; 0 if none is."""
        if self.reference or self.recompute == "all":
            return 1
        return 0 if self.recompute == "none" else int(self.recompute)
