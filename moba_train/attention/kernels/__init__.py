"""MoBA fused in Triton, for NVIDIA GPUs of compute capability 8.0 and later. One file a step, in the order of a call:

pool      mean key of every block, as two half-precision terms
select    the best earlier blocks of every query, streaming over block scores
route     choices (by query) -> lists of queries (by block)
forward   listed queries against their block: partial outputs
again     those whose weights left their range, once more
merge     causal attention in the own block, and the merge with the partial outputs
backward  the gradients, from the same lists
hopper    the kernels with most of the arithmetic once more, in Gluon, for GPUs of compute capability 9.0
plan      tile sizes, and the size of chunks that keep the workspace bounded
call      what the launches of one call share, and its chunks
launch_*  the steps in order, chunk by chunk: launch_forward and launch_backward
op        forward and backward as PyTorch operators, and the backend
rows      what several kernels share

Shapes, besides the package's letters: R = top_k - 1 chosen blocks of a query. A kv head serves W = T * G rows, row
w = t * G + g being query head k * G + g at token t, and their W * R choices: entry e = w * R + r. P parts of the tokens
are routed side by side.
"""
