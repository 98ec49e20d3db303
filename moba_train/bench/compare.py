"""Another implementation's results against checked ones, whole tensors at a time.

Two exact gates may choose differently where two scores are equal up to rounding, and packages round theirs more than
others. On random data, whose block means are all alike, that is a few rows in a hundred, and each of them is right in
its own way. So a row counts as equal or as chosen otherwise; of the second kind few are allowed, and dK and dV, which
sum over rows of both kinds, may differ by as much as such rows explain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moba_train.bench.check import TOLERANCE, CheckFailed, Results

OTHERWISE = 0.1  # share of rows
UNLIKE_GRADIENTS = 0.01  # of the rows with equal outputs: share whose dQ may be further off than four times the rest


@torch.no_grad()
def compare(found: Results, checked: Results) -> str:
    """The differences in words.

    Raises:
        CheckFailed: one of them is too large, or something is not a number.
    """
    for name, tensor in vars(found).items():
        if not bool(tensor.isfinite().all()):
            raise CheckFailed(f"{name} is not finite")
    tolerance = 2 * TOLERANCE[checked.out.dtype]  # both round
    equal = _row_errors(found.out, checked.out) <= tolerance
    otherwise = 1 - float(equal.float().mean())
    if otherwise > OTHERWISE:
        raise CheckFailed(f"out differs in {otherwise:.1%} of the rows, above {OTHERWISE:.0%}")
    unlike = float((_row_errors(found.d_query, checked.d_query)[equal] > 4 * tolerance).float().mean())
    if unlike > UNLIKE_GRADIENTS:
        raise CheckFailed(f"d_query differs in {unlike:.1%} of the rows with equal outputs")
    errors = {"d_key": _error(found.d_key, checked.d_key), "d_value": _error(found.d_value, checked.d_value)}
    limit = tolerance + 2 * math.sqrt(otherwise)
    for name, error in errors.items():
        if error > limit:
            raise CheckFailed(f"{name} differs by {error:.1e} of its norm, above {limit:.1e}")
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"{otherwise:.2%} of the rows chose otherwise, {told}"


def _row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """(T, H) shares of the rows' norms; rows without any to speak of (a first token's dQ is 0) count as equal."""
    norm = exact.float().norm(dim=-1)
    least = 1e-2 * norm.mean()
    return torch.where(norm < least, 0.0, (found.float() - exact.float()).norm(dim=-1) / norm)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())
