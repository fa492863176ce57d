"""The Triton kernels. Tensors are reached through tables of addresses; 0 stands for one that is missing.

Each program of a kernel over gradients works on one chunk: `chunks` holds its column, its first element and its length.
Elements are converted to the accumulator's dtype before anything is computed with them. Sums over chunks take two
stages of fixed order, so that equal inputs give equal bits.

A chunk takes the wide path, with 16 bytes a load, if it is full and all addresses it needs are multiples of 16.
"""

# ruff: noqa: RUF005, SIM108 (Triton compiles neither starred expressions nor calls in conditional ones)
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from igb_kernels.status import Status

CHUNK = 4096
"""Elements a program works on."""

LANES = 128
"""Threads of a program: 4 warps, Triton's default."""

NON_FINITE = tl.constexpr(int(Status.NON_FINITE))
"""The bit of `Status` that undoes moving averages."""


@triton.jit
def _load(address, offsets, limit, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Elements of a tensor as they are stored; 0 from `limit` on, and where there is no tensor."""
    start = address.to(tl.pointer_type(DTYPE))
    there = tl.broadcast_to(address, offsets.shape) != 0
    if WIDE:
        values = tl.load(tl.multiple_of(start, 16) + offsets, mask=there, other=0.0)
    else:
        values = tl.load(start + offsets, mask=there & (offsets < limit), other=0.0)
    return values


@triton.jit
def _store(address, offsets, limit, values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    start = address.to(tl.pointer_type(DTYPE))
    if WIDE:
        tl.store(tl.multiple_of(start, 16) + offsets, values.to(DTYPE))
    else:
        tl.store(start + offsets, values.to(DTYPE), mask=offsets < limit)


@triton.jit
def _chunk(chunks):
    """Column, first element and length of this program's chunk."""
    record = chunks + 3 * tl.program_id(0).to(tl.int64)
    return tl.load(record), tl.multiple_of(tl.load(record + 1), 16), tl.load(record + 2)


# ---- Sums over chunks --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total"])
def sum_partials(partials, out, total, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ partials[i]; or, SQUARE, out[i, j] = out[j, i] from a row for each pair, i ≥ j."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j <= i:
        entry = i
        if SQUARE:
            entry = i * (i + 1) // 2 + j
        row = partials + entry.to(tl.int64) * total
        sums = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, total, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            sums += tl.load(row + offsets, mask=offsets < total, other=0.0)
        result = tl.sum(sums, axis=0)
        if SQUARE:
            tasks = tl.num_programs(0)
            tl.store(out + i * tasks + j, result)
            tl.store(out + j * tasks + i, result)
        else:
            tl.store(out + i, result)


# ---- Gramian -----------------------------------------------------------------------------------------------------


@triton.jit
def _sums_of_pairs(
    addresses, first, length, partials, total,
    TASKS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # A thread sums the products of its own vector before it adds them: one register for each pair, not one vector.
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    sums = ()
    for _ in tl.static_range(TASKS * (TASKS + 1) // 2):
        sums = sums + (tl.zeros([LANES], dtype=ACC),)
    for start in range(0, length, LANES * VECTOR):
        offsets = first + start + lanes
        rows = ()
        for k in tl.static_range(TASKS):
            rows = rows + (_load(addresses[k], offsets, first + length, DTYPE, WIDE).to(ACC),)
        updated = ()
        for i in tl.static_range(TASKS):
            for j in tl.static_range(i + 1):
                updated = updated + (sums[i * (i + 1) // 2 + j] + tl.sum(rows[i] * rows[j], axis=1),)
        sums = updated
    for pair in tl.static_range(TASKS * (TASKS + 1) // 2):
        tl.store(partials + pair * total, tl.sum(sums[pair], axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["params", "before", "total"])
def gram_of_few(
    addresses, chunks, partials, params, before, total,
    TASKS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """All pairs of up to 8 rows, each element read once. `before` programs write the partial sums of other dtypes."""
    column, first, length = _chunk(chunks)
    rows = ()
    bits = column * 0
    for k in tl.static_range(TASKS):
        address = tl.load(addresses + k * params + column)
        rows = rows + (address,)
        bits |= address
    out = partials + before + tl.program_id(0)
    if (length == CHUNK) & (bits % 16 == 0):
        _sums_of_pairs(rows, first, length, out, total, TASKS, DTYPE, ACC, LANES, VECTOR, True)
    else:
        _sums_of_pairs(rows, first, length, out, total, TASKS, DTYPE, ACC, LANES, VECTOR, False)


@triton.jit
def _load_tile(addresses, offsets, limit, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """[rows, elements], as `_load`."""
    pointers = addresses.to(tl.pointer_type(DTYPE))[:, None] + offsets[None, :]
    there = (addresses != 0)[:, None]
    if WIDE:
        tile = tl.load(tl.multiple_of(pointers, [1, 16]), mask=there, other=0.0)
    else:
        tile = tl.load(pointers, mask=there & (offsets < limit)[None, :], other=0.0)
    return tile


@triton.jit
def _tile_product(
    rows, others, first, length,
    DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([TILE, TILE], dtype=ACC)
    for start in range(0, length, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        a = _load_tile(rows, offsets, first + length, DTYPE, WIDE).to(ACC)
        b = a
        if not ONE_TILE:
            b = _load_tile(others, offsets, first + length, DTYPE, WIDE).to(ACC)
        # Added, it would become the start of the next product: one long chain of roundings. Subtracted, it does not.
        sums -= tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=ACC)
    return -sums


@triton.jit(do_not_specialize=["params", "before", "total", "tasks"])
def gram_of_many(
    addresses, chunks, partials, params, before, total, tasks,
    DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ONE_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The pairs of two groups of TILE rows, which grid axes 1 and 2 choose; partial sums as in `gram_of_few`."""
    if tl.program_id(2) <= tl.program_id(1):
        column, first, length = _chunk(chunks)
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        j = tl.program_id(2) * TILE + tl.arange(0, TILE)
        rows = tl.load(addresses + i.to(tl.int64) * params + column, mask=i < tasks, other=0)
        others = tl.load(addresses + j.to(tl.int64) * params + column, mask=j < tasks, other=0)
        unaligned = tl.sum(rows % 16, axis=0) + tl.sum(others % 16, axis=0)
        if (length == CHUNK) & (unaligned == 0):
            sums = _tile_product(rows, others, first, length, DTYPE, ACC, TILE, BLOCK, ONE_TILE, True)
        else:
            sums = _tile_product(rows, others, first, length, DTYPE, ACC, TILE, BLOCK, ONE_TILE, False)
        pairs = i[:, None] * (i[:, None] + 1) // 2 + j[None, :]
        out = partials + before + tl.program_id(0) + pairs.to(tl.int64) * total
        tl.store(out, sums.to(tl.float64), mask=(j[None, :] <= i[:, None]) & (i < tasks)[:, None])


# ---- Squared norms, moving averages and sums of squares ----------------------------------------------------------


@triton.jit
def _sum_of_squares(
    row, first, length, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    sums = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, length, BLOCK):
        values = _load(row, first + start + tl.arange(0, BLOCK), first + length, DTYPE, WIDE).to(ACC)
        sums += values * values
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["params", "before", "total"])
def sq_norms(
    addresses, chunks, partials, params, before, total,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of the row that grid axis 1 chooses; partial sums as in `gram_of_few`."""
    column, first, length = _chunk(chunks)
    k = tl.program_id(1).to(tl.int64)
    row = tl.load(addresses + k * params + column)
    if (length == CHUNK) & (row % 16 == 0):
        total_of_chunk = _sum_of_squares(row, first, length, DTYPE, ACC, BLOCK, True)
    else:
        total_of_chunk = _sum_of_squares(row, first, length, DTYPE, ACC, BLOCK, False)
    tl.store(partials + k * total + before + tl.program_id(0), total_of_chunk.to(tl.float64))


@triton.jit
def _average(
    out, old, new, keep, take, first, length,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, length, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        state = _load(old, offsets, first + length, ACC, WIDE)
        grad = _load(new, offsets, first + length, DTYPE, WIDE).to(ACC)
        average = keep.to(ACC) * state + take.to(ACC) * grad
        _store(out, offsets, first + length, average, ACC, WIDE)
        # Elements past the end are 0 here, too.
        sums += average * average
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["params", "before", "total"])
def ema(
    out_addresses, state_addresses, grad_addresses, chunks, partials, decay, scales, params, before, total,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = decay · state + (1 - decay) · scales_k · grads and its squared norm; grid axis 1 chooses k."""
    column, first, length = _chunk(chunks)
    k = tl.program_id(1).to(tl.int64)
    entry = k * params + column
    out, old, new = tl.load(out_addresses + entry), tl.load(state_addresses + entry), tl.load(grad_addresses + entry)
    keep = tl.load(decay)
    take = 1 - keep
    if scales is not None:
        take *= tl.load(scales + k)
    length = tl.where(out != 0, length, 0)  # nothing to do without a tensor to write to
    if (length == CHUNK) & ((out | old | new) % 16 == 0):
        total_of_chunk = _average(out, old, new, keep, take, first, length, DTYPE, ACC, BLOCK, True)
    else:
        total_of_chunk = _average(out, old, new, keep, take, first, length, DTYPE, ACC, BLOCK, False)
    tl.store(partials + k * total + before + tl.program_id(0), total_of_chunk.to(tl.float64))


@triton.jit
def _add_squares(
    out, old, new, eps, first, length,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, length, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        grad = _load(new, offsets, first + length, DTYPE, WIDE).to(ACC)
        squares = grad * grad
        total = _load(old, offsets, first + length, ACC, WIDE) + squares
        _store(out, offsets, first + length, total, ACC, WIDE)
        # Elements past the end are 0 here, too.
        sums += squares * tl.rsqrt(total + eps.to(ACC))
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["params", "before", "total"])
def accumulate_squares(
    out_addresses, state_addresses, grad_addresses, chunks, partials, eps, params, before, total,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = state + grads² and Σ grads² / √(out + eps), for the row that grid axis 1 chooses."""
    column, first, length = _chunk(chunks)
    k = tl.program_id(1).to(tl.int64)
    entry = k * params + column
    out, old, new = tl.load(out_addresses + entry), tl.load(state_addresses + entry), tl.load(grad_addresses + entry)
    e = tl.load(eps)
    length = tl.where(out != 0, length, 0)
    if (length == CHUNK) & ((out | old | new) % 16 == 0):
        total_of_chunk = _add_squares(out, old, new, e, first, length, DTYPE, ACC, BLOCK, True)
    else:
        total_of_chunk = _add_squares(out, old, new, e, first, length, DTYPE, ACC, BLOCK, False)
    tl.store(partials + k * total + before + tl.program_id(0), total_of_chunk.to(tl.float64))


@triton.jit
def rollback(out_addresses, kept_addresses, chunks, status, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Copies `kept`, or zeros, to `out` if the status says so."""
    if (tl.load(status) & NON_FINITE) != 0:
        column, first, length = _chunk(chunks)
        out, kept = tl.load(out_addresses + column), tl.load(kept_addresses + column)
        if out != 0:
            for start in range(0, length, BLOCK):
                offsets = first + start + tl.arange(0, BLOCK)
                values = _load(kept, offsets, first + length, DTYPE, False)
                _store(out, offsets, first + length, values, DTYPE, False)


# ---- Weighted sum ------------------------------------------------------------------------------------------------


@triton.jit
def _weighted_sum(
    out, addresses, weights, first, length, params, tasks,
    DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, ACCUMULATE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for start in range(0, length, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        if ACCUMULATE:
            sums = _load(out, offsets, first + length, OUT, WIDE).to(ACC)
        else:
            sums = tl.zeros([BLOCK], dtype=ACC)
        for group in range(0, tasks, GROUP):
            for k in tl.static_range(GROUP):
                row = tl.load(addresses + (group + k) * params, mask=group + k < tasks, other=0)
                # A missing row adds nothing, also where its weight is NaN.
                weight = tl.load(weights + group + k, mask=row != 0, other=0.0).to(ACC)
                sums += weight * _load(row, offsets, first + length, DTYPE, WIDE).to(ACC)
        _store(out, offsets, first + length, sums, OUT, WIDE)


@triton.jit(do_not_specialize=["params", "tasks"])
def combine(
    out_addresses, addresses, chunks, weights, params, tasks,
    DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, ACCUMULATE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = Σ_k weights_k · row_k, or added to it. Each element is read before it is written: `out` may be a row."""
    column, first, length = _chunk(chunks)
    out = tl.load(out_addresses + column)
    rows = addresses + column
    bits = out
    for k in range(tasks):
        bits |= tl.load(rows + k * params)
    if out != 0:
        if (length == CHUNK) & (bits % 16 == 0):
            _weighted_sum(
                out, rows, weights, first, length, params, tasks, DTYPE, OUT, ACC, ACCUMULATE, GROUP, BLOCK, True
            )  # fmt: skip
        else:
            _weighted_sum(
                out, rows, weights, first, length, params, tasks, DTYPE, OUT, ACC, ACCUMULATE, GROUP, BLOCK, False
            )  # fmt: skip


# ---- One sign in each element ------------------------------------------------------------------------------------


@triton.jit
def _words(counter, streams):
    """Those of csrc/core/philox.h, [streams, 4]."""
    seed, step = tl.load(counter).to(tl.int64), tl.load(counter + 1).to(tl.int64)
    lower = streams.to(tl.uint32)
    a, b, c, d = tl.philox(
        seed, lower, (streams >> 32).to(tl.uint32), tl.zeros_like(lower) + step.to(tl.uint32),
        tl.zeros_like(lower) + (step >> 32).to(tl.uint32),
    )  # fmt: skip
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [streams.shape[0], 4])


@triton.jit
def _sum_of_one_sign(
    out, addresses, counter, leaks, column, first, length, params, tasks,
    DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, STREAMS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # A row of a block has the elements of one stream of random words.
    elements = tl.arange(0, STREAMS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    squares = tl.zeros([STREAMS, 4], dtype=ACC)
    for start in range(0, length, 4 * STREAMS):
        offsets = first + start + elements
        positive = tl.zeros([STREAMS, 4], dtype=ACC)
        negative = tl.zeros([STREAMS, 4], dtype=ACC)
        leaked_positive = tl.zeros([STREAMS, 4], dtype=ACC)
        leaked_negative = tl.zeros([STREAMS, 4], dtype=ACC)
        for group in range(0, tasks, GROUP):
            for k in tl.static_range(GROUP):
                row = tl.load(addresses + (group + k) * params, mask=group + k < tasks, other=0)
                g = _load(row, offsets, first + length, DTYPE, WIDE).to(ACC)
                above = tl.where(g > 0, g, 0.0)
                below = above - g
                positive += above
                negative += below
                if leaks is not None:
                    leak = tl.load(leaks + group + k, mask=row != 0, other=0.0).to(ACC)
                    leaked_positive += leak * above
                    leaked_negative += leak * below
        words = _words(counter, (column << 40) + (first + start) // 4 + tl.arange(0, STREAMS))
        # 2U - 1, in the 24 bits that a float32 holds.
        t = ((words >> 7) | 1).to(tl.int32) - (1 << 24)
        size = positive + negative
        up = positive - negative > (t.to(tl.float32) * (1.0 / (1 << 24))).to(ACC) * size
        chosen = tl.where(up, positive - leaked_negative, leaked_positive - negative)
        written = (chosen + (size - size)).to(OUT)  # NaN where not finite
        _store(out, offsets, first + length, written, OUT, WIDE)
        squares += written.to(ACC) * written.to(ACC)  # elements past the end are 0 here, too
    return tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit(do_not_specialize=["params", "tasks", "before"])
def sign_drop(
    out_addresses, addresses, chunks, partials, counter, leaks, params, tasks, before,
    DTYPE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, STREAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """In each element the rows' entries of one sign, and leaks_k of the others; partial sums of the squares of out."""
    column, first, length = _chunk(chunks)
    out = tl.load(out_addresses + column)
    rows = addresses + column
    bits = out
    for k in range(tasks):
        bits |= tl.load(rows + k * params)
    if (length == CHUNK) & (bits % 16 == 0):
        sum_of_chunk = _sum_of_one_sign(
            out, rows, counter, leaks, column, first, length, params, tasks, DTYPE, OUT, ACC, GROUP, STREAMS, True
        )  # fmt: skip
    else:
        sum_of_chunk = _sum_of_one_sign(
            out, rows, counter, leaks, column, first, length, params, tasks, DTYPE, OUT, ACC, GROUP, STREAMS, False
        )  # fmt: skip
    tl.store(partials + before + tl.program_id(0), sum_of_chunk.to(tl.float64))
