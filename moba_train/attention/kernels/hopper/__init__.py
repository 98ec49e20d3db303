"""The kernels that do most of the arithmetic, for Hopper, in Gluon: loads, products and exponentials side by side.

forward     ``routed_forward``, for blocks of several key tiles
resident    ``resident_forward``, for blocks of one key tile
query       ``routed_query``; at head_dim 64 by ``query_narrow``, for short blocks by ``query_short``; they share
            ``query_loads``
key_value   ``key_value``, with and without the entries' dQ; its warpgroups in ``key_value_sums``
select      ``select``
best        its lists of best pairs
hits        the scores that go into them
lanes       what one lane does alone
route       ``route``'s counting, and its lists' filling
scratch     the shared memory that it sorts in
own_forward ``merge``
own_query   ``merge_query``; for short blocks and at head_dim 64 by ``own_short``
own         what these two share
shared      what they share

Each sums the same products as the Triton kernel that it is named after, in tiles of its own, and takes its arguments;
``select`` makes the same choices, ``route`` the same lists.
"""

from moba_train.attention.kernels.hopper import (
    forward,
    key_value,
    own,
    own_forward,
    own_query,
    query,
    resident,
    route,
    select,
)

__all__ = ["forward", "key_value", "own", "own_forward", "own_query", "query", "resident", "route", "select"]
