"""Losses and the logits' gradient at once, in plain torch and in the Triton kernel under Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import moba_train
from moba_train.layers.cross_entropy import IGNORE, losses_and_gradient

CASES = [(5, 17), (3, 1000), (4, 40000)]  # the last vocabulary takes three blocks


def made(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 4 * torch.randn(tokens, vocabulary)
    targets = torch.randint(vocabulary, (tokens,))
    targets[1], targets[2] = IGNORE, vocabulary - 1
    return logits, targets


def expected(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, ignore_index=IGNORE, reduction="none")
    return losses.detach().float(), torch.autograd.grad(losses.sum(), leaf)[0].float()


@pytest.mark.parametrize(("tokens", "vocabulary"), CASES)
def test_plain(tokens: int, vocabulary: int) -> None:
    logits, targets = made(tokens, vocabulary)
    for got, want in zip(losses_and_gradient(logits.clone(), targets, False), expected(logits, targets), strict=True):
        torch.testing.assert_close(got, want)


def test_losses_of_bf16_logits_are_not_rounded_to_bf16() -> None:
    logits, targets = made(64, 500)
    logits = logits.bfloat16()
    losses, gradient = losses_and_gradient(logits.clone(), targets, False)
    assert losses.dtype is torch.float32 and gradient.dtype is torch.bfloat16
    torch.testing.assert_close(losses, expected(logits, targets)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), CASES)
def test_the_kernel_on_the_gpu(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, targets = made(tokens, vocabulary)
    logits, targets = logits.to("cuda", dtype), targets.to("cuda")
    wanted, slopes = expected(logits.float(), targets)
    losses, gradient = losses_and_gradient(logits, targets, True)
    assert gradient.data_ptr() == logits.data_ptr(), "in place"
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(gradient.float(), slopes, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_the_kernel_interpreted() -> None:
    """In a process of its own: Triton decides on its interpreter when a kernel is defined."""
    pytest.importorskip("triton")
    program = f"""
import torch, test_cross_entropy as here
from moba_train.layers.cross_entropy_kernel import cross_entropy
for tokens, vocabulary in {CASES}:
    logits, targets = here.made(tokens, vocabulary)
    losses, gradient = here.expected(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets, here.IGNORE), losses)
    torch.testing.assert_close(logits, gradient)
"""
    paths = [str(Path(__file__).parent), str(Path(moba_train.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{program}"],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
