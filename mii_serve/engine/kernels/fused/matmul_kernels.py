"""The Triton kernels that multiply matrices: a linear layer with its GEGLU, and attention.

As for `kernels.py`: **compiled and run in Triton's interpreter, not on a GPU yet.**
"""

from __future__ import annotations

import triton
import triton.language as tl

from mii_serve.engine.kernels.fused.kernels import _gelu


@triton.jit
def linear_geglu(tokens, weight, bias, made, num_tokens, width, DEPTH: tl.constexpr,
                 TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """(tokens × value weightᵀ + bias) × gelu(tokens × gate weightᵀ + bias); the gate's rows follow the value's in `weight`.

    `weight` is 2 width × DEPTH, CHANNELS divides the width and STEP the depth. One grid dimension: blocks of tokens and
    channels, GROUP blocks of tokens together, so that they find the same weights in the cache.
    """
    program = tl.program_id(0)
    num_across, num_down = width // CHANNELS, tl.cdiv(num_tokens, TOKENS)
    first_down = program // (GROUP * num_across) * GROUP
    height = tl.minimum(num_down - first_down, GROUP)
    in_group = program % (GROUP * num_across)
    token = (first_down + in_group % height) * TOKENS + tl.arange(0, TOKENS)
    channels = in_group // height * CHANNELS + tl.arange(0, CHANNELS)
    depth = tl.arange(0, STEP)
    is_token = token < num_tokens
    tokens_at = tokens + token.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    value_at = weight + channels[None, :] * DEPTH + depth[:, None]
    gate_at = value_at + width * DEPTH
    value = tl.zeros((TOKENS, CHANNELS), tl.float32)
    gate = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for start in range(0, DEPTH, STEP):
        left = tl.load(tokens_at + start, mask=is_token[:, None], other=0.0)
        value = tl.dot(left, tl.load(value_at + start), value)
        gate = tl.dot(left, tl.load(gate_at + start), gate)
    value += tl.load(bias + channels).to(tl.float32)[None, :]
    gate += tl.load(bias + width + channels).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * width + channels[None, :]
    tl.store(made + at, (value * _gelu(gate)).to(made.dtype.element_ty), mask=is_token[:, None])


@triton.jit
def _head_part(at, token, channels, stride, num_tokens, WIDTH: tl.constexpr,
               IS_WHOLE: tl.constexpr):  # fmt: skip
    """tokens × channels of one head, zeros where either ends."""
    pointers = at + token[:, None] * stride + channels[None, :]
    is_channel = (channels < WIDTH)[None, :]
    if IS_WHOLE:
        return tl.load(pointers, mask=is_channel, other=0.0)
    return tl.load(pointers, mask=is_channel & (token < num_tokens)[:, None], other=0.0)


@triton.jit
def attention(query, key, value, made, scale, num_queries, num_heads, query_row, query_token, key_row, key_token, made_row,
              made_token, NUM_KEYS: tl.constexpr, HEAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
              QUERIES: tl.constexpr, KEYS: tl.constexpr, IS_WHOLE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """softmax(query × keyᵀ × scale) × value without keeping scores, for heads of FIRST + SECOND channels, some of SECOND empty.

    A head of 40 channels is 32 + 16, 48 of which are multiplied, where one power of two would be 64. The tensors have rows
    and tokens with strides of their own, and heads side by side. Grid: blocks of QUERIES, rows × heads.
    IS_WHOLE: the keys fill their blocks.
    """
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first, second = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    query += row * query_row + head * HEAD
    key += row * key_row + head * HEAD
    value += row * key_row + head * HEAD
    query_first = _head_part(query, token, first, query_token, num_queries, HEAD, False)
    query_second = _head_part(query, token, second, query_token, num_queries, HEAD, False)
    scale_2 = scale * 1.4426950408889634  # powers of two are what the device computes
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    weights = tl.zeros((QUERIES,), tl.float32)
    made_first = tl.zeros((QUERIES, FIRST), tl.float32)
    made_second = tl.zeros((QUERIES, SECOND), tl.float32)
    for start in tl.range(0, NUM_KEYS, KEYS, num_stages=STAGES):
        key_tokens = start + tl.arange(0, KEYS)
        scores = tl.dot(query_first, tl.trans(_head_part(key, key_tokens, first, key_token, NUM_KEYS, HEAD, IS_WHOLE)))
        scores = tl.dot(
            query_second, tl.trans(_head_part(key, key_tokens, second, key_token, NUM_KEYS, HEAD, IS_WHOLE)), scores
        )
        if not IS_WHOLE:
            scores = tl.where((key_tokens < NUM_KEYS)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_2)
        shares = tl.exp2(scores * scale_2 - new_highest[:, None])
        older = tl.exp2(highest - new_highest)
        weights = weights * older + tl.sum(shares, axis=1)
        halves = shares.to(value.dtype.element_ty)
        made_first = tl.dot(
            halves, _head_part(value, key_tokens, first, key_token, NUM_KEYS, HEAD, IS_WHOLE), made_first * older[:, None]
        )
        made_second = tl.dot(
            halves, _head_part(value, key_tokens, second, key_token, NUM_KEYS, HEAD, IS_WHOLE), made_second * older[:, None]
        )
        highest = new_highest
    made += row * made_row + head * HEAD
    at = token[:, None] * made_token
    is_query = (token < num_queries)[:, None]
    of_weights = (1.0 / weights)[:, None]
    tl.store(made + at + first[None, :], (made_first * of_weights).to(made.dtype.element_ty), mask=is_query)
    is_second = is_query & (second < HEAD)[None, :]
    tl.store(made + at + second[None, :], (made_second * of_weights).to(made.dtype.element_ty), mask=is_second)
