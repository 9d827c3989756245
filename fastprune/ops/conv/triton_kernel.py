"""Triton kernels for convolutions on CUDA with everything behind them, forward and backward.

Imported where Triton is: it comes with every CUDA build of torch on Linux and needs no nvcc at installation.
"""

import triton
import triton.language as tl


@triton.jit
def _act(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)  # NaN stays
    elif ACTIVATION == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        clipped = tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3))
        return z * clipped / 6
    else:
        return z


@triton.jit
def _times_derivative(d, r, ACTIVATION: tl.constexpr):
    """Multiply by the derivative of an activation whose value is r."""
    if ACTIVATION == "relu":
        return tl.where(r <= 0, 0.0, d)  # NaN stays
    elif ACTIVATION == "relu6":
        return tl.where((r <= 0) | (r >= 6), 0.0, d)
    else:
        return d


@triton.jit
def _load_vector(vector, columns, inside, otherwise, HAS: tl.constexpr):
    if HAS:
        return tl.load(vector + columns, mask=inside, other=0.0)[None, :]
    else:
        return otherwise


@triton.jit
def _finish(
    acc, row_block, row, column, is_row, is_column, y, second, scale, shift, mask, added, sums,
    columns, y_pitch, second_pitch, added_pitch,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, SAVES_ARGUMENT: tl.constexpr, HAS_SECOND: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ADDED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """Compute what follows a convolution, or the gradient of its input, and write a block.

    Forward:

        z = scale * acc + shift + added;  r = activation(z);  y = mask * r;  second = z if SAVES_ARGUMENT else r

    Backward, where ``second``, which is read, is the input without its mask:

        d = acc + added;  y = mask * d * activation'(second);  sums[block of rows] = the sum of d * second over rows

    Pixels of y, ``second`` and ``added`` follow each other at a pitch; channels are neighbours.
    """
    inside = is_row[:, None] & is_column[None, :]
    row = row.to(tl.int64)
    gate = _load_vector(mask, column, is_column, 1.0, HAS_MASK)
    if HAS_ADDED:
        more = tl.load(added + row[:, None] * added_pitch + column[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        more = 0.0
    second_at = second + row[:, None] * second_pitch + column[None, :]
    if BACKWARD:
        d = acc + more
        if HAS_SECOND:
            r = tl.load(second_at, mask=inside, other=0.0).to(tl.float32)
            if HAS_SUMS:
                total = tl.sum(tl.where(inside, d * r, 0.0), axis=0)
                tl.store(sums + row_block * columns + column, total, mask=is_column)
            d = _times_derivative(d, r, ACTIVATION)
        result = d * gate
    else:
        z = acc * _load_vector(scale, column, is_column, 1.0, HAS_SCALE)
        z = z + _load_vector(shift, column, is_column, 0.0, HAS_SHIFT) + more
        r = _act(z, ACTIVATION)
        if HAS_SECOND:
            kept = z if SAVES_ARGUMENT else r
            tl.store(second_at, kept.to(second.dtype.element_ty), mask=inside)
        result = r * gate
    tl.store(y + row[:, None] * y_pitch + column[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_kernel(
    x, w, y, second, scale, shift, mask, added, sums,
    rows, columns, depth, height, width, out_height, out_width,
    x_image, x_row, x_pixel, w_column, w_depth, w_tap_row, w_tap, y_pitch, second_pitch, added_pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVES_ARGUMENT: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_SUMS: tl.constexpr,
    PRECISION: tl.constexpr, WIDENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Compute a block of BLOCK_ROWS pixels by BLOCK_COLUMNS channels of a convolution and what follows it.

    The gradient of an input, BACKWARD, is a convolution of the output's gradient x. WIDENS is for Triton's interpreter,
    which multiplies the bits of bfloat16 as integers.
    """
    # Blocks that share their pixels' or their weights' memory run next to each other: bands of BAND blocks of rows.
    block = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    in_band = BAND * column_blocks
    first = block // in_band * BAND
    band = min(row_blocks - first, BAND)
    row_block = first + block % in_band % band
    column_block = block % in_band // band

    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.arange(0, BLOCK_DEPTH)
    is_row, is_column = row < rows, column < columns
    image = row // (out_height * out_width)
    top = row // out_width % out_height * stride_h - padding_h
    left = row % out_width * stride_w - padding_w
    x_base = image.to(tl.int64) * x_image

    steps = tl.cdiv(depth, BLOCK_DEPTH)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for step in range(TAPS_H * TAPS_W * steps):
        tap = step // steps
        channel = step % steps * BLOCK_DEPTH + part
        is_channel = channel < depth
        h, v = top + tap // TAPS_W * dilation_h, left + tap % TAPS_W * dilation_w
        is_pixel = is_row & (h >= 0) & (h < height) & (v >= 0) & (v < width)
        at = x_base + h.to(tl.int64) * x_row + v.to(tl.int64) * x_pixel
        a = tl.load(x + at[:, None] + channel[None, :], mask=is_pixel[:, None] & is_channel[None, :], other=0.0)
        w_at = w + tap // TAPS_W * w_tap_row + tap % TAPS_W * w_tap
        b = tl.load(
            w_at + channel[:, None] * w_depth + column[None, :] * w_column,
            mask=is_channel[:, None] & is_column[None, :],
            other=0.0,
        )
        if WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    _finish(
        acc, row_block, row, column, is_row, is_column, y, second, scale, shift, mask, added, sums,
        columns, y_pitch, second_pitch, added_pitch, BACKWARD, ACTIVATION, SAVES_ARGUMENT, HAS_SECOND, HAS_SCALE,
        HAS_SHIFT, HAS_MASK, HAS_ADDED, HAS_SUMS,
    )  # fmt: skip


@triton.jit
def depthwise_kernel(
    x, w, y, second, scale, shift, mask, added, sums,
    rows, columns, height, width, out_height, out_width,
    x_image, x_row, x_pixel, w_column, w_tap_row, w_tap, y_pitch, second_pitch, added_pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVES_ARGUMENT: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a block of BLOCK_ROWS pixels by BLOCK_COLUMNS channels of a depthwise convolution and what follows it.

    BACKWARD: x is the gradient of the output, y that of the input, and stride, padding and dilation are those of the
    convolution: pixel i of the input meets pixel (i + padding - tap * dilation) / stride of the output.
    """
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row_block, column_block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = row < rows, column < columns
    top, left = row // out_width % out_height, row % out_width
    x_base = (row // (out_height * out_width)).to(tl.int64) * x_image
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for tap_h in range(TAPS_H):  # not unrolled: 25 taps at once spill registers
        for tap_w in tl.static_range(TAPS_W):
            if BACKWARD:
                far_h, far_w = top + padding_h - tap_h * dilation_h, left + padding_w - tap_w * dilation_w
                h, v = far_h // stride_h, far_w // stride_w
                meets = (far_h >= 0) & (far_w >= 0) & (h * stride_h == far_h) & (v * stride_w == far_w)
            else:
                h = top * stride_h - padding_h + tap_h * dilation_h
                v = left * stride_w - padding_w + tap_w * dilation_w
                meets = (h >= 0) & (v >= 0)
            is_pixel = is_row & meets & (h < height) & (v < width)
            at = x_base + h.to(tl.int64) * x_row + v.to(tl.int64) * x_pixel
            a = tl.load(x + at[:, None] + column[None, :], mask=is_pixel[:, None] & is_column[None, :], other=0.0)
            b = tl.load(w + column * w_column + tap_h * w_tap_row + tap_w * w_tap, mask=is_column, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    _finish(
        acc, row_block, row, column, is_row, is_column, y, second, scale, shift, mask, added, sums,
        columns, y_pitch, second_pitch, added_pitch, BACKWARD, ACTIVATION, SAVES_ARGUMENT, HAS_SECOND, HAS_SCALE,
        HAS_SHIFT, HAS_MASK, HAS_ADDED, HAS_SUMS,
    )  # fmt: skip
