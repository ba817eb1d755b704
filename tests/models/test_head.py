"""The head's loss and gradients equal those of the two steps it joins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lavis.models.compute import head
from lavis.models.compute.head import head_loss


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
@pytest.mark.parametrize("learns", [False, True])
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int, learns: bool
) -> None:
    monkeypatch.setattr(head, "_PIECE_BYTES", rows_at_a_time * 4 * 31)
    hidden = (3 * torch.randn(11, 7)).requires_grad_()
    weight = torch.randn(31, 7, requires_grad=learns)
    targets = torch.randint(31, (11,))
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    learned = [hidden, weight] if learns else [hidden]
    wanted_grads = torch.autograd.grad(wanted * 0.37, learned)
    got = head_loss(hidden, weight, targets)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    grads = torch.autograd.grad(got * 0.37, learned)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    loss = head_loss(hidden, weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_as_the_plain_way(autocast: bool) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(64, 32), torch.randn(500, 32)
    targets = torch.randint(500, (64,))
    exact = hidden.double().requires_grad_()
    F.cross_entropy(exact @ weight.double().T, targets, reduction="sum").backward()
    errors = []
    for way in (head_loss, lambda h, w, t: F.cross_entropy((h @ w.T).float(), t, reduction="sum")):
        low = hidden.clone() if autocast else hidden.bfloat16()
        low.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            way(low, weight if autocast else weight.bfloat16(), targets).backward()
        assert low.grad is not None
        errors.append((low.grad - exact.grad).norm() / exact.grad.norm())  # type: ignore[union-attr]
    assert errors[0] < 1.2 * errors[1]


def test_no_rows() -> None:
    hidden = torch.empty(0, 4, requires_grad=True)
    loss = head_loss(hidden, torch.randn(9, 4), torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
