# SPDX-License-Identifier: Apache-2.0
"""Tuples of blocks: one block for each gate, state or parameter."""

import triton
import triton.language as tl

# Bits of a step's flags, as gpu_rnn/backends/tensors.py has them (a test holds the two together).
SKIP_BIT, RESET_BIT = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_blocks(p, stride, mask, COUNT: tl.constexpr):
    """`COUNT` blocks that lie `stride` apart, in the dtype they are stored in."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.load(p, mask=mask, other=0.0),)
        p += stride
    return blocks


@triton.jit
def load_each(pointers, offsets, mask):
    """One block from each tensor, as fp32."""
    blocks = ()
    for i in tl.static_range(len(pointers)):
        blocks = blocks + (tl.load(pointers[i] + offsets, mask=mask, other=0.0).to(tl.float32),)
    return blocks


@triton.jit
def store_each(pointers, offsets, blocks, mask):
    for i in tl.static_range(len(pointers)):
        tl.store(pointers[i] + offsets, blocks[i], mask=mask)


@triton.jit
def store_joined(p, stride, blocks, mask):
    """Two or four blocks, `stride` apart, as one: what a store brings into another order meets the other warps twice,
    for one block as for four."""
    joined = tl.join(blocks[0], blocks[1])
    p, mask = p[:, :, None] + stride * tl.arange(0, 2), mask[:, :, None]
    if len(blocks) == 4:
        joined = tl.join(joined, tl.join(blocks[2], blocks[3]))
        p, mask = p[:, :, :, None] + 2 * stride * tl.arange(0, 2), mask[:, :, :, None]
    tl.store(p, joined, mask=mask)


@triton.jit
def as_float(blocks):
    converted = ()
    for i in tl.static_range(len(blocks)):
        converted = converted + (blocks[i].to(tl.float32),)
    return converted


@triton.jit
def to_each(blocks, dtype: tl.constexpr):
    converted = ()
    for i in tl.static_range(len(blocks)):
        converted = converted + (blocks[i].to(dtype),)
    return converted


@triton.jit
def select(condition, new, old):
    chosen = ()
    for i in tl.static_range(len(new)):
        chosen = chosen + (tl.where(condition, new[i], old[i]),)
    return chosen


@triton.jit
def select_each(conditions, new, old):
    """`new` where a state's own condition is not 0."""
    chosen = ()
    for i in tl.static_range(len(new)):
        chosen = chosen + (tl.where(conditions[i] != 0, new[i], old[i]),)
    return chosen


@triton.jit
def add_each(blocks, others):
    sums = ()
    for i in tl.static_range(len(blocks)):
        sums = sums + (blocks[i] + others[i],)
    return sums


@triton.jit
def zeros_like_each(blocks):
    zeros = ()
    for i in tl.static_range(len(blocks)):
        zeros = zeros + (tl.zeros_like(blocks[i]),)
    return zeros


@triton.jit
def zero_blocks(COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """So many blocks of zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
    return out


@triton.jit
def add_where(condition, blocks, others):
    """The others added where the condition holds; elsewhere they may hold anything."""
    out = ()
    for k in tl.static_range(len(blocks)):
        out = out + (blocks[k] + tl.where(condition, others[k], 0.0),)
    return out


@triton.jit
def store_sums(p, stride, blocks, mask):
    """Stores each block's sum over its rows."""
    for k in tl.static_range(len(blocks)):
        tl.store(p + k * stride, tl.sum(blocks[k], axis=0)[None, :], mask=mask)


@triton.jit
def part(blocks, BEGIN: tl.constexpr, END: tl.constexpr):
    chosen = ()
    for i in tl.static_range(BEGIN, END):
        chosen = chosen + (blocks[i],)
    return chosen
