from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moba_train.attention import keeping
from moba_train.attention.keeping import ATTENTION, CHOICES, contexts, keep


def test_outside_of_contexts_everything_is_computed() -> None:
    calls: list[int] = []
    assert [keep(CHOICES, lambda: calls.append(1) or len(calls)) for _ in range(2)] == [1, 2]


def test_the_second_pass_gets_what_the_first_one_computed_in_order() -> None:
    calls: list[str] = []

    def one(kind: str) -> str:
        return keep(kind, lambda: calls.append("") or f"{kind} {len(calls)}")

    def work() -> list[str]:
        return [one(CHOICES), one(ATTENTION), one(CHOICES)]

    first, second = contexts(frozenset({CHOICES}))
    other, _ = contexts(frozenset({CHOICES}))
    with first:
        expected = work()
    with other:
        work()
    with second:
        assert work() == [expected[0], f"{ATTENTION} {len(calls)}", expected[2]]


@pytest.mark.parametrize("kinds", [frozenset(), frozenset({ATTENTION})], ids=["nothing", "attention"])
def test_torchs_own_attention_is_kept_by_its_operator(kinds: frozenset[str], monkeypatch) -> None:
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    computed: list[str] = []
    original = keeping._Operators.__torch_dispatch__

    def attend(q, k, v):
        with keeping.keep_operator("aten::_scaled_dot_product_flash"):
            return scaled_dot_product_attention(q, k, v, is_causal=True).square()

    def counted(self, operator, types, args=(), kwargs=None):
        def run(*a, **k):
            computed.append(operator.name())
            return operator(*a, **k)

        run.name = operator.name
        return original(self, run, types, args, kwargs)

    monkeypatch.setattr(keeping._Operators, "__torch_dispatch__", counted)
    expected = torch.autograd.grad(attend(query, key, value).sum(), (query, key, value))
    out = checkpoint(attend, query, key, value, use_reentrant=False, context_fn=lambda: contexts(kinds))
    found = torch.autograd.grad(out.sum(), (query, key, value))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert sum("flash" in name for name in computed) == len(kinds)


def test_what_is_kept_goes_with_the_graph() -> None:
    @torch.library.custom_op("moba_train_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return keep(ATTENTION, lambda: 2 * x)

    doubled.register_autograd(lambda ctx, grad: 2 * grad)
    x = torch.ones(4, requires_grad=True)
    hidden = x * 1
    seen = weakref.ref(hidden)
    out = checkpoint(lambda y: doubled(y).exp(), hidden, use_reentrant=False, context_fn=lambda: contexts({ATTENTION}))
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * torch.ones(4)).exp())
    del out, hidden
    gc.collect()
    assert seen() is None
