"""phi of the block that a new token completes, for keys and values together, in two launches; see cache_triton.

Only every kernel_stride-th token of a sequence completes a block. Which sequences do is seen on the device, and programs of
the others end at once. The first launch multiplies by w_in, whose rows and columns are split among programs so that many
multiprocessors read it together; their sums over a part of the columns are left in fp32. The second adds them up and
does the rest: w_out, the key's norm, its rotation, and the store. In PyTorch (sieve.kernels.nsa.phi.compress, RMSNorm,
rotate) the same takes some 20 launches, which compute what is thrown away 15 times of 16. Results are rounded wherever
PyTorch rounds them, each chunk's share of the first layer by itself, so that the blocks' weights order as in training.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sieve.kernels.common.launch import after_earlier, overlap_options, overlaps
from sieve.kernels.common.rope_triton import turned
from sieve.kernels.nsa.cache_triton import blocks_of
from sieve.kernels.nsa.geometry import Geometry
from sieve.kernels.nsa.phi import AfterPhi, PhiWeights

# Of a program of the first launch: (sequence, KV head) pairs, as few as tl.dot takes; rows and columns of w_in, the latter of
# one chunk of kernel_stride tokens, and more where there are programs for more pairs, most of which only find that there is
# nothing to do.
ROWS, UNITS, PART, MOST_PART = 16, 32, 512, 2048
TOGETHER = 64  # columns of w_out that the second launch loads at once


@triton.jit
def _multiply(
    x_ptr, position_ptr, w_ptr, sum_ptr, bias_ptr, program, row, complete, pairs,
    HEADS: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x w_in^T of the pairs int [ROWS] `row` that are complete, and position w_in^T, for the program's units and columns."""
    TILES: tl.constexpr = (HIDDEN + UNITS - 1) // UNITS
    PARTS: tl.constexpr = L * DIM // CHUNK * ((CHUNK + PART - 1) // PART)
    unit = program % TILES * UNITS + tl.arange(0, UNITS)
    part = program // TILES
    chunk = part // ((CHUNK + PART - 1) // PART)
    first = part % ((CHUNK + PART - 1) // PART) * PART
    x_at = (row // HEADS).to(tl.int64) * (L * HEADS * DIM) + row % HEADS * DIM
    w_at = w_ptr + (unit * (L * DIM))[:, None]
    total = tl.zeros([ROWS, UNITS], tl.float32)
    bias = tl.zeros([ROWS, UNITS], tl.float32)  # as often as there are rows
    for begin in range(0, PART, STEP):
        place = first + begin + tl.arange(0, STEP)
        inside = (place < CHUNK)[None, :]
        column = chunk * CHUNK + place
        w = tl.load(w_at + column[None, :], mask=(unit < HIDDEN)[:, None] & inside, other=0.0)
        at = x_at[:, None] + (column + column // DIM * ((HEADS - 1) * DIM))[None, :]
        x = tl.load(x_ptr + at, mask=complete[:, None] & inside, other=0.0)
        same = tl.broadcast_to(column[None, :], (ROWS, STEP))
        position = tl.load(position_ptr + same, mask=inside, other=0.0)
        total = tl.dot(x, w.T, total, input_precision="ieee")
        bias = tl.dot(position, w.T, bias, input_precision="ieee")
    known = (unit < HIDDEN)[None, :]
    to = sum_ptr + ((part * pairs + row).to(tl.int64) * HIDDEN)[:, None] + unit[None, :]
    tl.store(to, total, mask=complete[:, None] & known)
    same_to = tl.broadcast_to((tl.program_id(1) * PARTS + part) * HIDDEN + unit[None, :], (ROWS, UNITS))
    tl.store(bias_ptr + same_to, bias, mask=(tl.arange(0, ROWS) == 0)[:, None] & known)


@triton.jit(do_not_specialize=["pairs"])
def _first_layer(
    past_ptr, k_ptr, v_ptr, k_position_ptr, v_position_ptr, k_w_ptr, v_w_ptr, k_sum_ptr, v_sum_ptr, k_bias_ptr, v_bias_ptr,
    pairs, HEADS: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K_HIDDEN: tl.constexpr, V_HIDDEN: tl.constexpr, K_PROGRAMS: tl.constexpr, UNITS: tl.constexpr, PART: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (K_PROGRAMS and as many as values need, pairs / ROWS); sums fp32 [parts, pairs, hidden], and of the
    position [pairs / ROWS, parts, hidden], parts the pieces of at most PART columns of all chunks."""
    program = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    after_earlier(OVERLAP)
    real = row < pairs
    row = tl.minimum(row, pairs - 1)
    past = tl.load(past_ptr + row // HEADS)
    complete = real & (blocks_of(past + 1, L, STRIDE) > blocks_of(past, L, STRIDE))
    if tl.max(complete.to(tl.int32), 0) > 0:
        if program < K_PROGRAMS:
            _multiply(
                k_ptr, k_position_ptr, k_w_ptr, k_sum_ptr, k_bias_ptr, program, row, complete, pairs,
                HEADS, L, STRIDE * DK, DK, K_HIDDEN, UNITS, PART, STEP, ROWS,
            )  # fmt: skip
        else:
            _multiply(
                v_ptr, v_position_ptr, v_w_ptr, v_sum_ptr, v_bias_ptr, program - K_PROGRAMS, row, complete, pairs,
                HEADS, L, STRIDE * DV, DV, V_HIDDEN, UNITS, PART, STEP, ROWS,
            )  # fmt: skip


@triton.jit
def _whole(
    sum_ptr, bias_ptr, pair, pairs, unit, dtype: tl.constexpr,
    HIDDEN: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The pair's first layer at int [n] `unit`, 0 past the last: fp32 [n], rounded to dtype; PARTS of each chunk."""
    part = tl.arange(0, PADDED)[:, None]
    some = (part < PARTS) & (unit < HIDDEN)[None, :]
    bias = tl.zeros_like(unit).to(tl.float32)
    total = bias
    for chunk in tl.static_range(CHUNKS):
        nth = chunk * PARTS + part
        share = tl.load(sum_ptr + (nth * pairs + pair).to(tl.int64) * HIDDEN + unit[None, :], mask=some, other=0.0)
        total = (total + tl.sum(share, 0).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        at = (pair // ROWS * (CHUNKS * PARTS) + nth) * HIDDEN + unit[None, :]
        bias += tl.sum(tl.load(bias_ptr + at, mask=some, other=0.0), 0)
    return (total + bias.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _output(
    sum_ptr, bias_ptr, w_ptr, pair, pairs, column, dtype: tl.constexpr,
    MLP: tl.constexpr, HIDDEN: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """phi's result of the pair at int [WIDE] `column`, 0 past the last, in fp32 but rounded to dtype."""
    if MLP:
        total = tl.zeros([WIDE, TOGETHER], tl.float32)
        for begin in range(0, HIDDEN, TOGETHER):
            unit = begin + tl.arange(0, TOGETHER)
            at = w_ptr + (column * HIDDEN)[:, None] + unit[None, :]
            w = tl.load(at, mask=(column < DIM)[:, None] & (unit < HIDDEN)[None, :], other=0.0)
            hidden = _whole(sum_ptr, bias_ptr, pair, pairs, unit, dtype, HIDDEN, CHUNKS, PARTS, PADDED, ROWS)
            hidden = (hidden / (1.0 + tl.exp(-hidden))).to(dtype).to(tl.float32)
            total += w.to(tl.float32) * hidden[None, :]
        out = tl.sum(total, 1)
    else:
        out = _whole(sum_ptr, bias_ptr, pair, pairs, column, dtype, HIDDEN, CHUNKS, PARTS, PADDED, ROWS)
    return out.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["pairs", "places"])
def _last_layer(
    past_ptr, k_sum_ptr, v_sum_ptr, k_bias_ptr, v_bias_ptr, k_w_ptr, v_w_ptr, norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr,
    pairs, places, eps,
    HEADS: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, HALF_WIDE: tl.constexpr,
    V_WIDE: tl.constexpr, K_HIDDEN: tl.constexpr, V_HIDDEN: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, ROWS: tl.constexpr, MLP: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, TOGETHER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, 2): keys, and values."""
    pair = tl.program_id(0)
    after_earlier(OVERLAP)
    past = tl.load(past_ptr + pair // HEADS)
    number = blocks_of(past, L, STRIDE)
    if blocks_of(past + 1, L, STRIDE) > number:
        to = pair.to(tl.int64) * places + number
        dtype: tl.constexpr = keys_ptr.dtype.element_ty
        if tl.program_id(1) == 0:
            HALF: tl.constexpr = DK // 2
            # In pairs of a rotation: 0, HALF, 1, HALF + 1, ..; past the last DK, which is nowhere.
            place = tl.arange(0, 2 * HALF_WIDE)
            column = tl.where(place // 2 < HALF, place % 2 * HALF + place // 2, DK)
            key = _output(
                k_sum_ptr, k_bias_ptr, k_w_ptr, pair, pairs, column, dtype,
                MLP, K_HIDDEN, L // STRIDE, K_PARTS, K_PADDED, ROWS, DK, 2 * HALF_WIDE, TOGETHER,
            )  # fmt: skip
            if NORM:
                weight = tl.load(norm_ptr + column, mask=column < DK, other=0.0).to(tl.float32)
                key = (key * tl.rsqrt(tl.sum(key * key, 0) / DK + eps) * weight).to(dtype).to(tl.float32)
            first, second = tl.split(tl.reshape(key, [HALF_WIDE, 2]))
            low = tl.arange(0, HALF_WIDE)
            ok = low < HALF
            if ROTATE:
                at = pair // HEADS * (L // STRIDE * HALF) + low
                cos = tl.load(cos_ptr + at, mask=ok, other=0.0)
                sin = tl.load(sin_ptr + at, mask=ok, other=0.0)
                first, second = turned(first, second, cos, sin)
            tl.store(keys_ptr + to * DK + low, first.to(dtype), mask=ok)
            tl.store(keys_ptr + to * DK + HALF + low, second.to(dtype), mask=ok)
        else:
            v_column = tl.arange(0, V_WIDE)
            value = _output(
                v_sum_ptr, v_bias_ptr, v_w_ptr, pair, pairs, v_column, dtype,
                MLP, V_HIDDEN, L // STRIDE, V_PARTS, V_PADDED, ROWS, DV, V_WIDE, TOGETHER,
            )  # fmt: skip
            tl.store(values_ptr + to * DV + v_column, value.to(dtype), mask=v_column < DV)


def compress_token(
    past: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, k_phi: PhiWeights, v_phi: PhiWeights, after: AfterPhi,
    geometry: Geometry,
) -> None:
    """The block that the token after past int32 [B] completes, if it does, by phi from what store_token returned, k and v
    [B * l, Hkv, D], and for keys `after`, to its place in the caches [B, Hkv, places, D]; nothing else changes there.

    In fp32, rounded to the caches' dtype where PyTorch's path rounds: each chunk's share, their sums, the layers' results, the
    norm's, the rotation's.
    Raises ValueError unless both phi are "mlp" or both "linear", with a position and without biases.
    """
    for weights in (k_phi, v_phi):
        if weights.kind not in ("mlp", "linear") or weights.kind != k_phi.kind:
            raise ValueError(f"kind={weights.kind!r} beside {k_phi.kind!r}: these kernels take two of mlp or two of linear")
        if weights.position is None or weights.b_in is not None or weights.b_out is not None:
            raise ValueError("these kernels take phi with a position and without biases")
    (B, heads, places, dk), dv, l, d = keys.shape, values.shape[3], geometry.kernel_size, geometry.kernel_stride
    pairs, mlp = B * heads, k_phi.kind == "mlp"
    k_hidden, v_hidden = k_phi.w_in.shape[0], v_phi.w_in.shape[0]
    tiles = triton.cdiv(pairs, ROWS)
    chunk = max(triton.next_power_of_2(d * max(dk, dv)), 16)
    part = min(PART * triton.next_power_of_2(tiles), MOST_PART, chunk)
    step = max(min(128 if tiles == 1 else 64, part) // (2 if k.dtype == torch.float32 else 1), 16)
    k_parts, v_parts = triton.cdiv(d * dk, part), triton.cdiv(d * dv, part)  # of a chunk
    parts = [(l // d * k_parts, k_hidden), (l // d * v_parts, v_hidden)]
    sums = [torch.empty(n, pairs, h, dtype=torch.float32, device=keys.device) for n, h in parts]
    sums += [torch.empty(tiles, n, h, dtype=torch.float32, device=keys.device) for n, h in parts]
    k_programs, v_programs = (triton.cdiv(h, UNITS) * n for n, h in parts)
    every = {"HEADS": heads, "L": l, "STRIDE": d, "DK": dk, "DV": dv, "K_HIDDEN": k_hidden, "V_HIDDEN": v_hidden}
    overlap = overlaps((k_programs + v_programs) * tiles, keys.device)
    _first_layer[(k_programs + v_programs, tiles)](
        past, *(x.contiguous() for x in (k, v, k_phi.position, v_phi.position, k_phi.w_in, v_phi.w_in)), *sums, pairs,
        K_PROGRAMS=k_programs, UNITS=UNITS, PART=part, STEP=step, ROWS=ROWS, **every,
        OVERLAP=overlap, **overlap_options(overlap), num_warps=4, num_stages=4,
    )  # fmt: skip
    # What plays no part stands for what is not there.
    norm, eps = after.norm or (past, 0.0)
    cos, sin = after.rotation or (past, past)
    overlap = overlaps(2 * pairs, keys.device)
    _last_layer[(pairs, 2)](
        past, *sums, *((w.w_out if mlp else w.w_in).contiguous() for w in (k_phi, v_phi)), norm, cos.contiguous(),
        sin.contiguous(), keys, values, pairs, places, eps, HALF_WIDE=triton.next_power_of_2(dk // 2),
        V_WIDE=triton.next_power_of_2(dv), K_PARTS=k_parts, V_PARTS=v_parts, K_PADDED=triton.next_power_of_2(k_parts),
        V_PADDED=triton.next_power_of_2(v_parts), ROWS=ROWS, MLP=mlp, NORM=after.norm is not None,
        ROTATE=after.rotation is not None, TOGETHER=TOGETHER, **every, OVERLAP=overlap, num_warps=8,
        enable_fp_fusion=False, **overlap_options(overlap),
    )  # fmt: skip
