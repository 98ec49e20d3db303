"""Is a MoBA result right, at sizes where no reference fits? Sampled rows and keys, computed in fp32.

Rows: the choices are compared with exact gate scores, output and dQ with plain attention over the keys they name. Keys:
dK and dV of some keys are summed over every query that reads them; those sums use the kernels' log-sum-exp, which the
sampled rows vouch for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.gate import representatives

ROWS, BLOCKS, KEYS = 48, 4, 16  # sampled rows; blocks, and keys of each
TOLERANCE = 1e-2  # of the norm: bf16 operands, fp32 sums
GATE = 1e-5  # of the range of a row's scores


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


class Judge:
    """Holds one call's tensors: query, d_out, out, d_query (T, H, D); key, value, d_key, d_value (T, K, D)."""

    def __init__(self, blocks: Blocks, choices: Tensor, block_size: int, scale: float, **tensors: Tensor) -> None:
        self.blocks, self.choices, self.block_size, self.scale = blocks, choices, block_size, scale
        self.at = tensors
        self.kv_heads = tensors["key"].shape[1]
        self.group = tensors["query"].shape[1] // self.kv_heads
        self.first = blocks.first[blocks.of_token]  # (T,) first block of each token's segment

    def errors(self) -> dict[str, float]:
        """Largest error of each result; "gate" is the largest lead of a block not chosen over one that is."""
        generator = torch.Generator().manual_seed(1)
        tokens, heads, _ = self.at["query"].shape
        worst = dict.fromkeys(("gate", "out", "d_query", "d_key", "d_value"), 0.0)
        means = representatives(self.at["key"], self.blocks, self.block_size)
        for token in [tokens - 1, *torch.randint(tokens, (ROWS,), generator=generator).tolist()]:
            head = int(torch.randint(heads, (), generator=generator))
            for name, error in self._row(token, head, means).items():
                worst[name] = max(worst[name], error)
        count = int(self.blocks.of_token[-1]) + 1
        for block in [0, count - 1, *torch.randint(count, (BLOCKS,), generator=generator).tolist()]:
            kv_head = int(torch.randint(self.kv_heads, (), generator=generator))
            for name, error in self._keys(block, kv_head).items():
                worst[name] = max(worst[name], error)
        return worst

    def verdict(self) -> str:
        """The errors in words.

        Raises:
            SystemExit: one of them is too large, or not a number.
        """
        errors = self.errors()
        for name, error in errors.items():
            if not error <= (GATE if name == "gate" else TOLERANCE):
                raise SystemExit(f"{name} is off by {error:.1e}; no speed is worth printing")
        return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())

    def _row(self, token: int, head: int, means: Tensor) -> dict[str, float]:
        kv_head, member = divmod(head, self.group)
        query = self.at["query"][token, head].float()
        first, own = int(self.first[token]), int(self.blocks.of_token[token])
        chosen = self.choices[kv_head, token, member].long()
        chosen = chosen[chosen != torch.iinfo(self.choices.dtype).max]
        scores = means[first:own, kv_head].double() @ query.double()
        left = torch.ones_like(scores, dtype=torch.bool)
        left[chosen] = False
        lead = 0.0
        if left.any() and len(chosen):
            lead = float((scores[left].max() - scores[chosen].min()) / (scores.max() - scores.min()))
        starts = self.blocks.bounds[first + chosen].long()
        earlier = (starts[:, None] + torch.arange(self.block_size, device=starts.device)).flatten()
        keys = torch.cat((earlier, torch.arange(int(self.blocks.bounds[own]), token + 1, device=starts.device)))
        key, value = self.at["key"][keys, kv_head].float(), self.at["value"][keys, kv_head].float()
        weights = (key @ query * self.scale).softmax(0)
        out, d_out = weights @ value, self.at["d_out"][token, head].float()
        d_scores = weights * (value @ d_out - out @ d_out)
        return {
            "gate": lead,
            "out": _off(self.at["out"][token, head], out),
            "d_query": _off(self.at["d_query"][token, head], d_scores @ key * self.scale),
        }

    def _keys(self, block: int, kv_head: int) -> dict[str, float]:
        start, stop = int(self.blocks.bounds[block]), int(self.blocks.bounds[block + 1])
        keys = torch.linspace(start, stop - 1, KEYS, device=self.first.device).long()
        key, value = self.at["key"][keys, kv_head].float(), self.at["value"][keys, kv_head].float()
        choices = self.choices[kv_head]
        named = choices != torch.iinfo(choices.dtype).max
        reads = (named & (choices.int() + self.first[:, None, None] == block)).any(-1)  # (T, G)
        reads |= (self.blocks.of_token == block)[:, None]
        token, member = reads.nonzero(as_tuple=True)
        head = kv_head * self.group + member
        query, d_out, out = (self.at[name][token, head].float() for name in ("query", "d_out", "out"))
        lse = self.at["lse"][kv_head].view(-1, self.group)[token, member]
        weights = torch.exp2(query @ key.T * (self.scale * torch.log2(torch.tensor(torch.e)).item()) - lse[:, None])
        weights = weights.masked_fill((self.blocks.of_token[token] == block)[:, None] & (token[:, None] < keys), 0)
        d_scores = weights * (d_out @ value.T - (d_out * out).sum(-1, keepdim=True))
        return {
            "d_key": _off(self.at["d_key"][keys, kv_head], d_scores.T @ query * self.scale),
            "d_value": _off(self.at["d_value"][keys, kv_head], weights.T @ d_out),
        }
