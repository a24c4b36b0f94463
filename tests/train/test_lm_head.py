"""The LM head in chunks: the same losses and gradients, whatever the chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_unlearning.train import engine as engines
from robust_unlearning.train.engine import losses_by_row

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_of_any_size_give_the_same_losses_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CHUNK_BYTES", rows * 4 * 11)
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(5, 11, generator=draw, dtype=torch.float64)
    scale = torch.randn(7, generator=draw, dtype=torch.float64)
    hidden = torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    sizes = []

    def project(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part @ head

    losses = losses_by_row(hidden, project, lambda logits, part: logits.logsumexp(-1) * scale[part], 11)
    losses.square().sum().backward()
    other = hidden.detach().clone().requires_grad_()
    expected = (other @ head).logsumexp(-1) * scale
    expected.square().sum().backward()
    assert max(sizes) == min(rows, 7)
    assert sum(sizes) == 7
    np.testing.assert_allclose(losses.detach(), expected.detach(), rtol=1e-12)
    np.testing.assert_allclose(hidden.grad, other.grad, rtol=1e-12)


def test_without_gradients_the_head_makes_none() -> None:
    def loss(logits: Tensor, _rows: slice) -> Tensor:
        assert not logits.requires_grad
        return logits.sum(-1)

    assert losses_by_row(torch.ones(4, 3), lambda part: part * 2, loss, 3).tolist() == [6.0] * 4
