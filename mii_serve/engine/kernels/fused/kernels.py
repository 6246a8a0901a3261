"""The Triton kernels. Images are N × pixels × channels in memory (channels last); sums are in float32.

Importing this module needs Triton, and no GPU. What calls them is `triton_operations.py`, which has their shapes and grids; the
tiles, in capitals here, are in `tiles.py`. **They have been compiled and run in Triton's interpreter, not on a GPU yet.**
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _summed(image, bias, residual, other, row, pixels, channels, mask, num_pixels,
            width, other_width, bias_stride, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
            HAS_OTHER: tl.constexpr):  # fmt: skip
    """A block, pixels × channels, of (image + bias + residual), followed along the channels by `other`."""
    first = row.to(tl.int64) * num_pixels + pixels[:, None]
    is_first = mask
    if HAS_OTHER:
        is_first = mask & (channels < width)[None, :]
    at = first * width + channels[None, :]
    value = tl.load(image + at, mask=is_first, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + row * bias_stride + channels, mask=channels < width, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=is_first, other=0.0).to(tl.float32)
    if HAS_OTHER:
        behind = first * other_width + (channels - width)[None, :]
        value += tl.load(other + behind, mask=mask & (channels >= width)[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def group_norm_whole(image, bias, residual, other, gamma, beta, after, normed,
                     total, num_pixels, width, other_width, bias_stride, epsilon,
                     GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PIXELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                     HAS_RESIDUAL: tl.constexpr, HAS_OTHER: tl.constexpr, KEEPS_TOTAL: tl.constexpr,
                     HAS_AFTER: tl.constexpr, IS_SILU: tl.constexpr):  # fmt: skip
    """A group of a row in one program, read once. Grid: rows, groups. PIXELS holds all of them."""
    row, group = tl.program_id(0), tl.program_id(1)
    channels = group * GROUP + tl.arange(0, GROUP_PADDED)
    is_channel = tl.arange(0, GROUP_PADDED) < GROUP
    pixels = tl.arange(0, PIXELS)
    mask = (pixels < num_pixels)[:, None] & is_channel[None, :]
    value = _summed(image, bias, residual, other, row, pixels, channels, mask, num_pixels, width, other_width, bias_stride,
                    HAS_BIAS, HAS_RESIDUAL, HAS_OTHER)  # fmt: skip
    all_channels = width + other_width
    at = (row.to(tl.int64) * num_pixels + pixels[:, None]) * all_channels + channels[None, :]
    if KEEPS_TOTAL:
        kept = value
        if HAS_AFTER:
            kept += tl.load(after + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        tl.store(total + at, kept.to(total.dtype.element_ty), mask=mask)
    count = num_pixels * GROUP
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), axis=1), axis=0) / count
    value = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(tl.sum(value * value, axis=1), axis=0) / count
    scale = tl.load(gamma + channels, mask=is_channel, other=0.0).to(tl.float32) / tl.sqrt(variance + epsilon)
    made = value * scale[None, :] + tl.load(beta + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if IS_SILU:
        made = _silu(made)
    tl.store(normed + at, made.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def group_sums(image, bias, residual, other, after, total, sums, num_pixels,
               width, other_width, bias_stride, num_chunks, PIXELS: tl.constexpr,
               BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
               HAS_OTHER: tl.constexpr, KEEPS_TOTAL: tl.constexpr, HAS_AFTER: tl.constexpr):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a chunk of PIXELS × BLOCKS pixels: rows × chunks × 2 × channels.

    Grid: rows, chunks, blocks of CHANNELS.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    all_channels = width + other_width
    is_channel = channels < all_channels
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for block in range(BLOCKS):
        pixels = (chunk * BLOCKS + block) * PIXELS + tl.arange(0, PIXELS)
        mask = (pixels < num_pixels)[:, None] & is_channel[None, :]
        value = _summed(image, bias, residual, other, row, pixels, channels, mask, num_pixels, width, other_width, bias_stride,
                        HAS_BIAS, HAS_RESIDUAL, HAS_OTHER)  # fmt: skip
        if KEEPS_TOTAL:
            kept = value
            if HAS_AFTER:
                kept += tl.load(after + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            at = (row.to(tl.int64) * num_pixels + pixels[:, None]) * all_channels + channels[None, :]
            tl.store(total + at, kept.to(total.dtype.element_ty), mask=mask)
        # Chan's way of joining the sums of two parts.
        added = tl.minimum(tl.maximum(num_pixels - (chunk * BLOCKS + block) * PIXELS, 0), PIXELS).to(tl.float32)
        joined = tl.maximum(count + added, 1.0)
        block_mean = tl.sum(tl.where(mask, value, 0.0), axis=0) / tl.maximum(added, 1.0)
        value = tl.where(mask, value - block_mean[None, :], 0.0)
        difference = block_mean - mean
        squares += tl.sum(value * value, axis=0) + difference * difference * (count * added / joined)
        mean += difference * (added / joined)
        count += added
    at = (row * num_chunks + chunk) * 2 * all_channels + channels
    tl.store(sums + at, mean, mask=is_channel)
    tl.store(sums + at + all_channels, squares, mask=is_channel)


@triton.jit
def group_scales(sums, gamma, beta, bias, after, scales, num_pixels, channels,
                 bias_stride, num_chunks, epsilon, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
                 CHUNKS: tl.constexpr, CHUNK_PIXELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_AFTER: tl.constexpr):  # fmt: skip
    """What `group_apply` multiplies and adds, rows × 2 × channels, from all chunks of a group. Grid: rows, groups.

    `bias` is missing from what `group_apply` reads, `after` is in it and not in the sums.
    """
    row, group = tl.program_id(0), tl.program_id(1)
    of_group = tl.arange(0, GROUP_PADDED)
    is_channel = of_group < GROUP
    channel = group * GROUP + of_group
    chunk = tl.arange(0, CHUNKS)
    mask = (chunk < num_chunks)[:, None] & is_channel[None, :]
    at = (row * num_chunks + chunk[:, None]) * 2 * channels + channel[None, :]
    means = tl.load(sums + at, mask=mask, other=0.0)
    squares = tl.load(sums + at + channels, mask=mask, other=0.0)
    counts = tl.where(mask, tl.minimum(num_pixels - chunk[:, None] * CHUNK_PIXELS, CHUNK_PIXELS).to(tl.float32), 0.0)
    count = num_pixels * GROUP
    mean = tl.sum(tl.sum(means * counts, axis=1), axis=0) / count
    means -= mean
    variance = tl.sum(tl.sum(squares + counts * means * means, axis=1), axis=0) / count
    scale = tl.load(gamma + channel, mask=is_channel, other=0.0).to(tl.float32) / tl.sqrt(variance + epsilon)
    shift = tl.load(beta + channel, mask=is_channel, other=0.0).to(tl.float32) - mean * scale
    if HAS_BIAS:
        shift += scale * tl.load(bias + row * bias_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_AFTER:
        shift -= scale * tl.load(after + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(scales + row * 2 * channels + channel, scale, mask=is_channel)
    tl.store(scales + row * 2 * channels + channels + channel, shift, mask=is_channel)


@triton.jit
def group_apply(image, scales, normed, num_pixels, width, PIXELS: tl.constexpr,
                CHANNELS: tl.constexpr, IS_SILU: tl.constexpr):  # fmt: skip
    """image × scale + shift, then SiLU. Grid: rows, blocks of PIXELS, blocks of CHANNELS."""
    row = tl.program_id(0)
    pixels = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < width
    mask = (pixels < num_pixels)[:, None] & is_channel[None, :]
    scale = tl.load(scales + row * 2 * width + channels, mask=is_channel, other=0.0)
    shift = tl.load(scales + row * 2 * width + width + channels, mask=is_channel, other=0.0)
    at = (row.to(tl.int64) * num_pixels + pixels[:, None]) * width + channels[None, :]
    made = tl.load(image + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if IS_SILU:
        made = _silu(made)
    tl.store(normed + at, made.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def upsample(image, bias, residual, made, num_pixels, width, image_width, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
             HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_LARGER: tl.constexpr):  # fmt: skip
    """image + bias + residual; with IS_LARGER each pixel four times. Grid: rows, blocks of PIXELS, blocks of CHANNELS."""
    row = tl.program_id(0)
    pixels = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (pixels < num_pixels)[:, None] & (channels < width)[None, :]
    value = _summed(image, bias, residual, image, row, pixels, channels, mask, num_pixels, width, 0, 0, HAS_BIAS, HAS_RESIDUAL,
                    False)  # fmt: skip
    value = value.to(made.dtype.element_ty)
    if IS_LARGER:
        above = row.to(tl.int64) * num_pixels * 4 + (pixels // image_width) * (4 * image_width) + (pixels % image_width) * 2
        at = above[:, None] * width + channels[None, :]
        tl.store(made + at, value, mask=mask)
        tl.store(made + at + width, value, mask=mask)
        tl.store(made + at + 2 * image_width * width, value, mask=mask)
        tl.store(made + at + 2 * image_width * width + width, value, mask=mask)
    else:
        at = (row.to(tl.int64) * num_pixels + pixels)[:, None] * width + channels[None, :]
        tl.store(made + at, value, mask=mask)


@triton.jit
def layer_norm(tokens, bias, gamma, beta, normed, num_tokens, width, epsilon,
               TOKENS: tl.constexpr, WIDTH_PADDED: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """The LayerNorm of tokens + bias. Grid: blocks of TOKENS."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, WIDTH_PADDED)
    is_channel = channels < width
    mask = (token < num_tokens)[:, None] & is_channel[None, :]
    at = token.to(tl.int64)[:, None] * width + channels[None, :]
    value = tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(value, axis=1) / width
    value = tl.where(mask, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + epsilon)
    gammas = tl.load(gamma + channels, mask=is_channel, other=0.0).to(tl.float32)
    betas = tl.load(beta + channels, mask=is_channel, other=0.0).to(tl.float32)
    made = value * scale[:, None] * gammas[None, :] + betas[None, :]
    tl.store(normed + at, made.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def geglu(hidden, made, num_tokens, width, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """hidden[:, :width] × gelu(hidden[:, width:]). Grid: blocks of TOKENS, blocks of CHANNELS."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (token < num_tokens)[:, None] & (channels < width)[None, :]
    at = token.to(tl.int64)[:, None] * (2 * width) + channels[None, :]
    value = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(hidden + at + width, mask=mask, other=0.0).to(tl.float32)
    out = token.to(tl.int64)[:, None] * width + channels[None, :]
    tl.store(made + out, (value * _gelu(gate)).to(made.dtype.element_ty), mask=mask)


@triton.jit
def sampler_begin(state, slots, input_scale, model_input, latents, num_pixels, CHANNELS: tl.constexpr, PLANES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """The first plane of each sample's state, scaled: as it is, and in the UNet's dtype and in channels last.

    Grid: samples, blocks of BLOCK of a plane's numbers.
    """
    sample = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = CHANNELS * num_pixels
    mask = at < size
    value = tl.load(state + tl.load(slots + sample) * PLANES * size + at, mask=mask, other=0.0)
    value *= tl.load(input_scale + sample)
    tl.store(model_input + sample * size + at, value, mask=mask)
    in_channels_last = (at % num_pixels) * CHANNELS + at // num_pixels
    tl.store(latents + sample * size + in_channels_last, value.to(latents.dtype.element_ty), mask=mask)


@triton.jit
def _guided(noise_pred, row, uncond_row, scale, at, mask, num_pixels, CHANNELS: tl.constexpr):
    """The conditional prediction and the guided one, of numbers `at` of a plane."""
    size = CHANNELS * num_pixels
    in_channels_last = (at % num_pixels) * CHANNELS + at // num_pixels
    text = tl.load(noise_pred + row.to(tl.int64) * size + in_channels_last, mask=mask, other=0.0).to(tl.float32)
    uncond = tl.load(noise_pred + uncond_row * size + in_channels_last, mask=mask, other=0.0).to(tl.float32)
    return text, uncond + scale * (text - uncond)


@triton.jit
def _joined(count, mean, squares, value, mask, added):
    """Count, mean and squared deviations with a block of values more."""
    block_mean = tl.sum(tl.where(mask, value, 0.0), axis=0) / added
    deviation = tl.where(mask, value - block_mean, 0.0)
    difference = block_mean - mean
    joined = count + added
    squares += tl.sum(deviation * deviation, axis=0) + difference * difference * (count * added / joined)
    return mean + difference * (added / joined), squares


@triton.jit
def sampler_end(noise_pred, uncond_row, guidance_scale, guidance_rescale, slots, state, noise, matrices, prediction, num_pixels,
                CHANNELS: tl.constexpr, PLANES: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr,
                BLOCKS: tl.constexpr):  # fmt: skip
    """Guidance, and the step of every sampler: the planes of a state are matrix × (planes, prediction, noise).

    Grid: samples, blocks of BLOCK of a plane's numbers; BLOCKS is how many of them there are. Only a sample whose guidance is
    rescaled reads all its predictions in each program.
    """
    sample = tl.program_id(0)
    size = CHANNELS * num_pixels
    uncond = tl.load(uncond_row + sample)
    scale = tl.load(guidance_scale + sample)
    rescale = tl.load(guidance_rescale + sample)
    factor = 1.0
    if rescale > 0.0:
        count = 0.0
        text_mean, text_squares, mean, squares = 0.0, 0.0, 0.0, 0.0
        for block in range(BLOCKS):
            every = block * BLOCK + tl.arange(0, BLOCK)
            text, guided = _guided(noise_pred, sample, uncond, scale, every, every < size, num_pixels, CHANNELS)
            added = tl.minimum(size - block * BLOCK, BLOCK).to(tl.float32)
            text_mean, text_squares = _joined(count, text_mean, text_squares, text, every < size, added)
            mean, squares = _joined(count, mean, squares, guided, every < size, added)
            count += added
        factor = rescale * tl.sqrt(text_squares / squares) + (1.0 - rescale)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    _, guided = _guided(noise_pred, sample, uncond, scale, at, mask, num_pixels, CHANNELS)
    guided *= factor
    tl.store(prediction + sample * size + at, guided, mask=mask)
    fresh = tl.load(noise + sample * size + at, mask=mask, other=0.0)
    of_state = state + tl.load(slots + sample) * PLANES * size + at
    plane_0 = tl.load(of_state, mask=mask, other=0.0)
    plane_1 = tl.load(of_state + size, mask=mask, other=0.0)
    plane_2 = tl.load(of_state + 2 * size, mask=mask, other=0.0)
    plane_3 = tl.load(of_state + 3 * size, mask=mask, other=0.0)
    plane_4 = tl.load(of_state + 4 * size, mask=mask, other=0.0)
    for plane in tl.static_range(PLANES):
        row = matrices + (sample * PLANES + plane) * INPUTS
        made = tl.load(row) * plane_0 + tl.load(row + 1) * plane_1 + tl.load(row + 2) * plane_2
        made += tl.load(row + 3) * plane_3 + tl.load(row + 4) * plane_4
        made += tl.load(row + 5) * guided + tl.load(row + 6) * fresh
        tl.store(of_state + plane * size, made, mask=mask)
