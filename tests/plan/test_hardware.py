"""Rates of GPUs: the measured one, the others by ratio, and what a user gives in their place."""

from __future__ import annotations

import pytest

from moba_train.plan.hardware import H200, PlanConfig, hardware


def test_the_measured_gpu_is_itself() -> None:
    assert hardware(PlanConfig()) == H200


def test_another_gpu_by_its_data_sheet() -> None:
    h100 = hardware(PlanConfig(gpu="H100"))
    assert h100.matmul_tflops == H200.matmul_tflops and not h100.measured
    assert h100.hbm_gbs == pytest.approx(H200.hbm_gbs * 3350 / 4800)


def test_given_figures_win() -> None:
    found = hardware(PlanConfig(gpu="A100-80GB", memory_gb=40, moba_forward_tflops={512: 100.0}))
    assert found.memory_gb == 40 and found.moba_tflops(64, backward=False) == 100
    assert found.moba_tflops(8192, backward=False) == 100


def test_rates_between_block_sizes() -> None:
    machine = hardware(PlanConfig(moba_backward_tflops={128: 100.0, 512: 200.0}))
    assert [machine.moba_tflops(size, backward=True) for size in (64, 128, 256, 512, 4096)] == [100, 100, 150, 200, 200]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PlanConfig(gpu="H900"), "plan.gpu=H900 is unknown: choose from H200, H100"),
        (PlanConfig(hbm_gbs=-1), "plan.hbm_gbs=-1: must be above 0"),
        (PlanConfig(moba_forward_tflops={128: 0.0}), "plan.moba_forward_tflops="),
    ],
)
def test_refusals(settings: PlanConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hardware(settings)
