"""Parts of a model whose cost is moving memory: fused kernels, the MLP in tiles, cross entropy of a tile of tokens."""
