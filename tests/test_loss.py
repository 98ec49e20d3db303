from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moba_train.loss import (
    IGNORE,
    TokenLosses,
    refuse_changed_logits,
    scaled_loss,
    shift_labels,
    take_targets,
    tiled_losses,
)


def test_shift_gives_each_position_its_rows_next_label() -> None:
    labels = torch.tensor([[IGNORE, 5, 6], [IGNORE, 8, IGNORE]])
    assert shift_labels(labels).tolist() == [[5, 6, IGNORE], [8, IGNORE, IGNORE]]


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_tiles_equal_whole_logits(tile: int, bias: bool) -> None:
    layer = nn.Linear(8, 50, bias=bias)
    hidden = torch.randn(64, 8, requires_grad=True)
    targets = torch.randint(50, (64,))
    targets[::5] = IGNORE
    weights = torch.rand(64)

    whole = F.cross_entropy(layer(hidden), targets, ignore_index=IGNORE, reduction="none")
    expected = torch.autograd.grad((whole * weights).sum(), [hidden, *layer.parameters()])
    tiled = tiled_losses(hidden, layer, targets, tile)
    gradients = torch.autograd.grad((tiled * weights).sum(), [hidden, *layer.parameters()])

    assert tiled[::5].eq(0).all()
    torch.testing.assert_close(tiled, whole)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize("bias", [False, True], ids=["at once", "computed again"])
def test_the_scaled_loss_equals_whole_logits(tile: int, bias: bool) -> None:
    layer = nn.Linear(8, 50, bias=bias)
    hidden = torch.randn(64, 8, requires_grad=True)
    targets = torch.randint(50, (64,))
    targets[::5] = IGNORE
    losses = F.cross_entropy(layer(hidden), targets, ignore_index=IGNORE, reduction="none")
    expected = torch.autograd.grad(3 * 0.01 * losses.sum(), [hidden, *layer.parameters()])
    total, each = scaled_loss(hidden, layer, targets, 0.01, tile)
    found = torch.autograd.grad(3 * total, [hidden, *layer.parameters()])
    torch.testing.assert_close(total, 0.01 * losses.sum())
    torch.testing.assert_close(each, losses.detach())
    assert not each.requires_grad
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_of_the_output_layer_add_up_in_fp32() -> None:
    """2,048 tiles of one token with the same gradient: bf16 sums would stop growing at 256 of them."""
    layer = nn.Linear(8, 50, bias=False).to(torch.bfloat16)
    hidden = torch.ones(2048, 8, dtype=torch.bfloat16, requires_grad=True)
    total, _ = scaled_loss(hidden, layer, torch.zeros(2048, dtype=torch.int64), 1.0, 1)
    (found,) = torch.autograd.grad(total, layer.weight)
    weight = layer.weight.detach().double().requires_grad_()
    whole = F.cross_entropy(hidden.double() @ weight.t(), torch.zeros(2048, dtype=torch.int64), reduction="sum")
    (expected,) = torch.autograd.grad(whole, weight)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1.0)


def test_only_a_tile_of_logits_exists() -> None:
    sizes = []
    layer = nn.Linear(8, 50)
    layer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    tiled_losses(torch.randn(64, 8, requires_grad=True), layer, torch.randint(50, (64,)), 16).sum().backward()
    assert sizes == [16] * 8  # four tiles, each once forward and once more in the backward pass


def test_losses_are_fp32_whatever_the_model_is() -> None:
    layer = nn.Linear(8, 50).to(torch.bfloat16)
    losses = tiled_losses(torch.randn(4, 8, dtype=torch.bfloat16), layer, torch.randint(50, (4,)), 2)
    assert losses.dtype is torch.float32


def test_an_output_layer_that_takes_targets_gives_logits_without_them() -> None:
    layer = nn.Linear(8, 50, bias=False)
    hidden, targets = torch.randn(2, 3, 8), torch.randint(50, (6,))
    logits = layer(hidden)
    take_targets(layer, tile_tokens=4, fused=False)
    assert torch.equal(layer(hidden), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    for scale, given in ((1.0, ()), (0.5, (0.5,))):
        total, losses = layer(hidden.flatten(0, 1), targets, *given)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(total, scale * expected.sum())


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"])
def test_a_model_that_changes_its_logits_is_refused(name: str) -> None:
    """The loss would be another, and nothing would tell."""
    for value in (None, 1, 1.0):
        refuse_changed_logits(SimpleNamespace(model_type="other", **{name: value}))  # type: ignore[arg-type]
    changed = SimpleNamespace(model_type="other", **{name: 0.5})
    with pytest.raises(ValueError, match=rf"{name}=0\.5: other changes its logits after the output layer"):
        refuse_changed_logits(changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        TokenLosses(SimpleNamespace(config=changed), 8)  # type: ignore[arg-type]
