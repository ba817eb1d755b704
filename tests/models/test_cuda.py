"""The code path of a GPU; skips itself without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavis.models.compute.attention import Documents, packed_attention
from lavis.models.compute.schedule import StepSchedule
from tests.models.test_fast_path import REFERENCE, data, model_and_batch, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
_ = data  # a fixture


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_variable_length_attention(prefix: int, kv_heads: int) -> None:
    lengths = (7, 1, 12)
    torch.manual_seed(0)

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16)

    query, key, value = random(4, 20), random(kv_heads, 20), random(kv_heads, 20)
    query.requires_grad_()
    before = ((random(kv_heads, prefix), random(kv_heads, prefix)),) if prefix else ()
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    results = []
    for square in (True, False):
        documents = Documents(lengths, before, square)
        out, _ = packed_attention(module, query, key, value, None, 0.125, documents=documents)
        (grad,) = torch.autograd.grad(out.float().square().sum(), query)
        results.append((out, grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_step_equals_the_reference(data: Path) -> None:
    model, batch = model_and_batch(data)
    model = model.cuda()
    results: list[Any] = []
    for schedule in (REFERENCE, StepSchedule(), StepSchedule(recompute="all")):
        model.set_schedule(schedule)
        results.append(step(model, batch))
    for loss, count, grads in results[1:]:
        assert (loss, count) == (pytest.approx(results[0][0], abs=1e-4), results[0][1])
        for name, grad in grads.items():
            assert float((grad - results[0][2][name]).norm() / results[0][2][name].norm()) < 1e-3
