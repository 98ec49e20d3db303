"""Is a result right, at sizes where no reference fits? Sampled rows and keys, computed in fp32.

Rows: the choices are compared with exact gate scores, output and dQ with plain attention over the keys they name.
Keys: dK and dV of some keys are summed over every query that reads them. Dense attention is the same with one block a
segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.gate import exact_matmul, representatives

ROWS, BLOCKS, KEYS = 48, 4, 16  # sampled rows; blocks, and keys of each
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 3e-5}  # of the norm
FOREIGN = 3  # times that for torch's own kernels: in bf16 dQ of the CPU's was seen off by 1.4e-2 at 32K tokens
GATE = 1e-5  # of the range of a row's scores
GATHERED = {"cpu": 1 << 24, "cuda": 1 << 28}  # numbers of keys that are copied at a time
MOST_GATHERED = {"cpu": 1 << 30, "cuda": 1 << 34}  # in all for one block; one that needs more is not looked at


class CheckFailed(Exception):
    """A result that is not what the definition says; the message says which and by how much."""


@dataclass(frozen=True)
class Results:
    """Of one call: out and d_query (T, H, D), d_key and d_value (T, K, D)."""

    out: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


class Judge:
    """Holds one call: its inputs, its results, and which blocks its queries read."""

    def __init__(
        self,
        tensors: list[Tensor],
        results: Results,
        blocks: Blocks,
        choices: Tensor,
        block_size: int,
        scale: float,
        lse: Tensor | None = None,
        tolerance: float | None = None,
    ) -> None:
        """
        Args:
            tensors: query, key, value and the output's gradient.
            choices: (T, H, R) indices into ``blocks``, -1 for none; R = 0 where queries read their own block alone.
            lse: (T, H), the rows' natural log-sum-exps as the call made them, vouched for by the sampled rows. Without
                them they are computed anew, for blocks that few queries read.
            tolerance: of the norms; None: ``TOLERANCE``.
        """
        self.query, self.key, self.value, self.d_out = (tensor.detach() for tensor in tensors)
        self.results, self.blocks, self.choices, self.lse = results, blocks, choices, lse
        self.block_size, self.scale = block_size, scale
        self.kv_heads = self.key.shape[1]
        self.group = self.query.shape[1] // self.kv_heads
        self.tolerance = TOLERANCE[self.query.dtype] if tolerance is None else tolerance

    @torch.no_grad()
    def verdict(self) -> str:
        """The largest errors in words; "gate" is the largest lead of a block not chosen over one that is.

        Raises:
            CheckFailed: one of them is too large, or not a number.
        """
        with exact_matmul(self.query.device):
            worst = self._errors()
        if "d_key" not in worst:
            raise CheckFailed("no block has few enough readers to check d_key and d_value")
        for name, error in worst.items():
            if not error <= (GATE if name == "gate" else self.tolerance):
                raise CheckFailed(f"{name} is off by {error:.1e}")
        return ", ".join(f"{name} {error:.1e}" for name, error in worst.items())

    def _errors(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)
        tokens, heads, _ = self.query.shape
        worst: dict[str, float] = {}
        gated = self.choices.shape[-1] > 0
        means = representatives(self.key, self.blocks, self.block_size) if gated else None
        for token in [tokens - 1, *torch.randint(tokens, (ROWS,), generator=generator).tolist()]:
            # A segment's first token reads itself alone: its dQ is 0, and no share of it is an error.
            token += token == int(self.blocks.bounds[self.blocks.first[self.blocks.of_token[token]]])
            head = int(torch.randint(heads, (), generator=generator))
            _raise_to(worst, self._row(token, head, means))
        count = int(self.blocks.of_token[-1]) + 1
        for block in [0, count - 1, *torch.randint(count, (BLOCKS,), generator=generator).tolist()]:
            kv_head = int(torch.randint(self.kv_heads, (), generator=generator))
            _raise_to(worst, self._keys(block, kv_head))
        return worst

    def _row(self, token: int, head: int, means: Tensor | None) -> dict[str, float]:
        kv_head = head // self.group
        query = self.query[token, head].float()
        own = int(self.blocks.of_token[token])
        chosen = self.choices[token, head].long()
        chosen = chosen[chosen >= 0]
        lead = 0.0 if means is None else self._lead(chosen, int(self.blocks.first[own]), own, means[:, kv_head], query)
        keys = self._read(chosen, own, token)
        key, value = self.key[keys, kv_head].float(), self.value[keys, kv_head].float()
        weights = (key @ query * self.scale).softmax(0)
        out, d_out = weights @ value, self.d_out[token, head].float()
        # The gradient of the output that was given out, rounded: a second token's dQ is a small difference.
        d_scores = weights * (value @ d_out - self.results.out[token, head].float() @ d_out)
        return {
            "gate": lead,
            "out": _off(self.results.out[token, head], out),
            "d_query": _off(self.results.d_query[token, head], d_scores @ key * self.scale),
        }

    def _read(self, chosen: Tensor, own: int, token: int) -> Tensor:
        """The keys that a row reads."""
        starts = self.blocks.bounds[chosen].long()
        earlier = (starts[:, None] + torch.arange(self.block_size, device=starts.device)).flatten()
        return torch.cat((earlier, torch.arange(int(self.blocks.bounds[own]), token + 1, device=starts.device)))

    def _lead(self, chosen: Tensor, first: int, own: int, means: Tensor, query: Tensor) -> float:
        """How far the best block left out is above the worst chosen one, as a share of the range of scores."""
        scores = means[first:own].double() @ query.double()
        left = torch.ones_like(scores, dtype=torch.bool)
        left[chosen - first] = False
        if len(chosen) != min(self.choices.shape[-1], own - first):
            return float("inf")
        if not left.any() or not len(chosen):
            return 0.0
        return float((scores[left].max() - scores[chosen - first].min()) / (scores.max() - scores.min()))

    def _keys(self, block: int, kv_head: int) -> dict[str, float]:
        start, stop = int(self.blocks.bounds[block]), int(self.blocks.bounds[block + 1])
        if self.lse is None:  # the last keys, which few queries of their own block read
            keys = torch.arange(max(start, stop - KEYS), stop, device=self.key.device)
        else:
            keys = torch.linspace(start, stop - 1, KEYS, device=self.key.device).long()
        heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
        reads = (self.choices[:, heads] == block).any(-1)  # (T, G)
        of_token = self.blocks.of_token
        position = torch.arange(len(of_token), device=of_token.device)
        reads |= ((of_token == block) & (position >= keys[0]))[:, None]
        token, member = reads.nonzero(as_tuple=True)
        head = kv_head * self.group + member
        lse = self._log_sum_exps(token, head, kv_head) if self.lse is None else self.lse[token, head]
        if lse is None:
            return {}
        query, d_out, out = (x[token, head].float() for x in (self.query, self.d_out, self.results.out))
        key, value = self.key[keys, kv_head].float(), self.value[keys, kv_head].float()
        weights = torch.exp(query @ key.T * self.scale - lse[:, None])
        weights = weights.masked_fill((of_token[token] == block)[:, None] & (token[:, None] < keys), 0)
        d_scores = weights * (d_out @ value.T - (d_out * out).sum(-1, keepdim=True))
        return {
            "d_key": _off(self.results.d_key[keys, kv_head], d_scores.T @ query * self.scale),
            "d_value": _off(self.results.d_value[keys, kv_head], weights.T @ d_out),
        }

    def _log_sum_exps(self, token: Tensor, head: Tensor, kv_head: int) -> Tensor | None:
        """Of some rows, over the keys they read; None where that would gather too many."""
        longest = int(self.blocks.bounds.diff().max())  # of an own block: shorter than block_size in short segments
        per_row = (self.choices.shape[-1] * self.block_size + longest) * self.key.shape[-1]
        if len(token) * per_row > MOST_GATHERED[self.key.device.type]:
            return None
        rows = max(1, GATHERED[self.key.device.type] // per_row)
        parts = zip(token.split(rows), head.split(rows), strict=True)
        return torch.cat([self._chunk(*part, kv_head, longest) for part in parts])

    def _chunk(self, token: Tensor, head: Tensor, kv_head: int, longest: int) -> Tensor:
        device, bounds = token.device, self.blocks.bounds.long()
        chosen = self.choices[token, head].long()  # (rows, R)
        earlier = bounds[chosen.clamp(min=0)][:, :, None] + torch.arange(self.block_size, device=device)
        own = bounds[self.blocks.of_token[token].long()][:, None] + torch.arange(longest, device=device)
        real = torch.cat(((chosen >= 0)[:, :, None].expand_as(earlier).flatten(1), own <= token[:, None]), dim=1)
        keys = torch.cat((earlier.flatten(1), own), dim=1).clamp(max=len(self.key) - 1)
        scores = torch.einsum("rd,rkd->rk", self.query[token, head].float(), self.key[keys, kv_head].float())
        return (scores * self.scale).masked_fill(~real, -torch.inf).logsumexp(-1)


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def _raise_to(worst: dict[str, float], errors: dict[str, float]) -> None:
    for name, error in errors.items():
        if name not in worst or not error <= worst[name]:  # NaN replaces, and is not replaced
            worst[name] = error
