"""Every backend against the definition: output and all three gradients."""

from __future__ import annotations

import logging
import random
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.cases import CASES, DEVICES, TOLERANCE, Case, assert_close, attend
from moba_train.attention import AttentionSpec, full_attention, moba_attention
from moba_train.attention.backends import BACKENDS, Backend, resolve
from moba_train.attention.reference import reference

FULL = AttentionSpec("full")


NEED_CUDA = {"triton": "triton", "flash_moba": "flash_moba", "moonshot": "moba"}  # and a package
ON_CPU = [name for name in BACKENDS if name not in {"reference", *NEED_CUDA}]  # triton's kernels: test_kernels.py
ON_GPU = [*ON_CPU, *(name for name, package in NEED_CUDA.items() if find_spec(package))]
ON_GPU = ON_GPU if torch.cuda.is_available() else []


@pytest.fixture(
    params=[
        *(pytest.param((name, "cpu"), id=f"{name}-cpu") for name in ON_CPU),
        *(pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ON_GPU),
    ]
)
def place(request) -> tuple[str, str]:
    """Backend and device."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


def compare(place: tuple[str, str], case: Case, spec: AttentionSpec, dtype: torch.dtype, seed: int = 0) -> None:
    """Hold a backend against the fp32 reference of the same (rounded) inputs."""
    backend, device = place
    tensors = case.tensors(device, dtype, seed)
    refusal = BACKENDS[backend].refuses(*tensors[:2], spec)
    if refusal:
        pytest.skip(refusal)
    found = attend(BACKENDS[backend].function, case, spec, tensors)
    assert all(x.dtype == dtype for x in found.values())
    expected = attend(reference, case, spec, tuple(x.float() for x in tensors))
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moba_matches_the_reference(place, case, dtype):
    compare(place, case, case.spec, dtype)


def test_triton_refuses_more_blocks_than_its_gate_keeps(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # in place of a GPU
    query = torch.empty(1, 1, 1, dtype=torch.half).expand(1 << 16, 4, 64)
    message = "top_k 2050 is 2049 earlier blocks a query, above 2048; use a larger block_size; choose another, or auto"
    with pytest.raises(ValueError, match=message):
        resolve("triton", query, query, AttentionSpec("moba", 16, 2050))
    assert resolve("triton", query, query, AttentionSpec("moba", 16, 2049)) is BACKENDS["triton"].function
    assert resolve("triton", query, query, AttentionSpec("moba", 64, 10**6)) is BACKENDS["triton"].function
    assert resolve("auto", query, query, AttentionSpec("moba", 16, 2050)) is BACKENDS["varlen"].function


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_matches_the_reference(place, case, dtype):
    compare(place, case, FULL, dtype)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_match_the_reference(place, seed):
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    case = Case(
        "random",
        lengths=(
            *(draw.choice([0, 1, draw.randint(1, 40), draw.randint(1, 250)]) for _ in range(draw.randint(0, 6))),
            90,
        ),
        heads=kv_heads * draw.choice([1, 2, 4]),
        kv_heads=kv_heads,
        head_dim=draw.choice([16, 32, 64]),
        block_size=draw.choice([16, 32, draw.randint(16, 80)]),
        top_k=draw.randint(1, 6),
    )
    dtype = torch.float32 if place[1] == "cpu" else torch.bfloat16
    compare(place, case, case.spec, dtype, seed)


@pytest.mark.parametrize("name", BACKENDS)
def test_top_k_covering_everything_is_dense(name, device):
    case = Case("dense", (160,), block_size=16, top_k=10)
    query, key, value, _ = tensors = case.tensors(device, torch.float32 if device == "cpu" else torch.bfloat16)
    refusal = BACKENDS[name].refuses(query, key, case.spec)
    if refusal:
        pytest.skip(refusal)
    heads_first = (x.float().transpose(0, 1)[None] for x in (query, key, value))
    dense = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    found = attend(BACKENDS[name].function, case, case.spec, tensors)
    assert_close({"out": found["out"]}, {"out": dense}, TOLERANCE[query.dtype])


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_do_not_touch_each_other(name):
    """NaN in one document stays there, in the output and in every gradient."""
    case = Case("poisoned", (50, 45, 70))
    query, key, _, _ = tensors = case.tensors()
    refusal = BACKENDS[name].refuses(query, key, case.spec)
    if refusal:
        pytest.skip(refusal)
    for spec in (case.spec, FULL):
        clean = attend(BACKENDS[name].function, case, spec, tensors)
        for start, stop in ((0, 50), (50, 95), (95, 165)):
            poisoned = tuple(x.clone() for x in tensors)
            for tensor in poisoned:
                tensor[start:stop] = torch.nan
            found = attend(BACKENDS[name].function, case, spec, poisoned)
            for what, expected in clean.items():
                others = torch.cat((found[what][:start], found[what][stop:]))
                assert torch.equal(others, torch.cat((expected[:start], expected[stop:]))), (what, start)


@pytest.mark.parametrize("name", BACKENDS)
def test_scale_is_honoured(name):
    case = Case("scaled", (90,))
    query, key, value, _ = case.tensors()
    refusal = BACKENDS[name].refuses(query, key, case.spec)
    if refusal:
        pytest.skip(refusal)
    expected = moba_attention(query, key, value, block_size=16, top_k=2, scale=0.5, backend="reference")
    found = moba_attention(query, key, value, block_size=16, top_k=2, scale=0.5, backend=name)
    assert_close({"out": found}, {"out": expected}, 1e-5)
    default = moba_attention(query, key, value, block_size=16, top_k=2, backend=name)
    assert not torch.allclose(found, default, atol=1e-3)


def test_auto_takes_the_first_that_fits_and_says_why(caplog, monkeypatch):
    query, key, _, _ = Case("auto", (8,)).tensors()
    monkeypatch.setitem(BACKENDS, "varlen", Backend(BACKENDS["varlen"].function, lambda *_: "it rains"))
    with caplog.at_level(logging.INFO, logger="moba_train.attention"):
        assert resolve("auto", query, key, FULL) is reference
        assert resolve("auto", query, key, FULL) is reference
    (message,) = caplog.messages
    assert "reference" in message and "varlen: it rains" in message


def test_forward_mode_derivatives_are_the_references(caplog):
    """torch would take those of our operators as zero."""
    case = Case("tangents", (90,))
    query, key, value, tangent = case.tensors()

    def derivative(backend: str) -> torch.Tensor:
        def of_value(x: torch.Tensor) -> torch.Tensor:
            return moba_attention(query, key, x, block_size=16, top_k=3, backend=backend)

        return torch.func.jvp(of_value, (value,), (tangent[:, : value.shape[1]],))[1]

    assert derivative("reference").abs().max() > 0.1
    with caplog.at_level(logging.INFO, logger="moba_train.attention"):
        assert torch.equal(derivative("auto"), derivative("reference"))
    assert "varlen: it has no forward-mode derivatives" in caplog.text
    with pytest.raises(ValueError, match="varlen cannot run here: it has no forward-mode derivatives"):
        derivative("varlen")


def test_a_named_backend_never_falls_back(monkeypatch):
    query, key, value, _ = Case("named", (8,)).tensors()
    monkeypatch.setitem(BACKENDS, "varlen", Backend(BACKENDS["varlen"].function, lambda *_: "it rains"))
    with pytest.raises(ValueError, match="varlen cannot run here: it rains"):
        full_attention(query, key, value, backend="varlen")


def test_an_unknown_backend_lists_the_choices():
    query, key, value, _ = Case("unknown", (8,)).tensors()
    with pytest.raises(ValueError, match=r"backend=fast is unknown: choose from auto, .*varlen, reference"):
        full_attention(query, key, value, backend="fast")
