"""CUDA kernels for pruned convolutions, written in Numba.

Three factories; each returns a kernel closed over its sizes, because Numba wants those of arrays as constants:

    tensor_core_kernel   kept columns of 16 or 32 rows, on the tensor cores: blocks, column vectors, hybrids, 2:4
    reduce_kernel        adds up the slices of a convolution that `tensor_core_kernel` computed in slices
    scalar_kernel        single kept weights, on the CUDA cores: unstructured and balanced rows, for comparison

All read and write activations as `reprolib.sparse.cuda.to_layout` makes them, ``[groups][C][H+2h][W+2h][8]`` fp16,
where one image group is 8 images side by side and h the width of the zero halo. So each (channel, pixel) is one *row*
of 16 aligned bytes, for every tap: a row is what an asynchronous copy moves, what the tensor cores' loads address, and
what eight columns of a multiplication are. No im2col: a kept column of the GEMM view is just an address.

Pointers are passed as integers: an array argument would cost a microsecond of launch time.
`reprolib.sparse.cuda.packing` says what the packed arrays hold and computes in NumPy what these kernels compute.

Importing this module needs numba-cuda, but no GPU.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types
from numba.cuda.types import float32, int64, uint8, uint32

from reprolib.sparse.cuda.packing import AGE_BIT, CHUNK, IMAGES, LOOK_AHEAD, ROW_BYTES, SLOTS, TAP_BITS, WARP, Tile
from reprolib.sparse.cuda.ptx import (
    commit_copies,
    copy_async,
    load_f32,
    load_f32_x2,
    load_i32,
    load_matrices_transposed,
    load_shared_f32_x4,
    load_shared_x4,
    load_u16,
    load_u32,
    load_x4,
    maximum,
    mma,
    mma_sparse_high,
    mma_sparse_low,
    pack_halves,
    pack_halves_relu,
    shared_address,
    store_f32_x4,
    store_shared,
    store_shared_f32_x4,
    store_x4,
    successor,
    unpack_halves,
    wait_all_but_newest,
)


def tensor_core_kernel(tile: Tile):
    """The kernel for one `Tile`. Block: ``(tile.threads,)``; grid: ``(row blocks, patches of a map, deep patches *
    slices)``, where a deep patch is `tile.deep` image groups.

    A block computes `tile.block_rows` output channels of one patch, a warp `tile.rows` of them. Step by step the
    channels that its row block needs go through a ring in shared memory, one chunk a step:

        step t:    | t-1 |  t  | t+1 | t+2 |      t-1, t: read;   t+1, t+2: on their way from global memory
                   +-----+-----+-----+-----+

    and each warp multiplies the groups of kept columns that are due at this step. Their weights come straight from
    global memory, ordered as the tensor cores want them, one group ahead. In the end, warps that share their output
    channels hand their sums to the first of them, through the memory that the ring no longer needs.

    With one slice, `y` gets relu(max_pool(sums) + bias) as fp16 activations, the halo written as zeros. With more, each
    slice does its share of the steps, and `y` gets the fp32 sums of all threads, for `reduce_kernel`:
    ``[slices][blocks][row_tiles * pixels][threads][4]``.
    """
    taps, tall, wide, deep = tile.taps, tile.tall, tile.wide, tile.deep
    sparse, relu, pool = tile.two_of_four, tile.relu, tile.pool
    warps, row_tiles, rows, block_rows = tile.warps, tile.row_tiles, tile.rows, tile.block_rows
    threads, splits, pixels, sums = tile.threads, tile.splits, tile.pixels, tile.row_tiles * tile.pixels * 4
    # Fours of sums that warps hand over at once: all, or half of them.
    quad_bytes, handed = tile.quad_bytes, sums // 4
    if handed * quad_bytes * (splits // 2) > tile.shared_bytes:
        handed //= 2
    pitch, image_rows, channel_bytes, slot_bytes = tile.pitch, tile.image_rows, tile.channel_bytes, tile.slot_bytes
    shared_bytes = tile.shared_bytes
    halo_in, patch_tall, patch_wide = taps // 2, tall + taps - 1, wide + taps - 1
    patch_area, patch_rows = patch_tall * patch_wide, patch_tall * patch_wide * deep
    channels_at_once = threads // patch_rows
    copies = -(-CHUNK // channels_at_once)
    fragments, fragment_bytes = 4 * row_tiles, 512 * row_tiles
    depth = 32 if sparse else 16  # columns in a group
    codes = depth - 1  # mask: lane -> its column in the group
    shrink = 1 + pool
    tall_out, wide_out = tall // shrink, wide // shrink
    area_out = tall_out * wide_out
    pixels_out = area_out * deep
    stores = -(-pixels_out // 4)  # of a lane, for each channel
    window = (tall_out + 2) * (wide_out + 2)
    # A warp's output rows on their way through shared memory. 160 instead of 128 bytes: free of bank conflicts.
    out_pitch = 160
    out_bytes = out_pitch * pixels

    def tensor_core(
        x, y, weights, metadata, columns, schedule, bias,
        c_in, height, width, c_out, image_groups, halo, slices,
    ):  # fmt: skip
        ring = shared_address(cuda.shared.array(shared_bytes, uint8, alignment=ROW_BYTES))
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        # Row blocks of one patch are neighbours in the grid, so that they find its activations in the L2 cache.
        row_block, row_blocks, patch = cuda.blockIdx.x, cuda.gridDim.x, cuda.blockIdx.y
        deep_patch, deep_patches, piece = cuda.blockIdx.z, cuda.gridDim.z, 0
        # In 32 bits, because a division in 64 takes several times as long, and is a call.
        if slices > 1:
            piece = uint32(deep_patch) % uint32(slices)
            deep_patch, deep_patches = uint32(deep_patch) // uint32(slices), uint32(deep_patches) // uint32(slices)
        patches_wide = (width + wide - 1) // wide
        top = uint32(patch) // uint32(patches_wide) * tall
        left = uint32(patch) % uint32(patches_wide) * wide
        first_group = deep_patch * deep
        width_in, plane_in = width + 2 * halo_in, (width + 2 * halo_in) * (height + 2 * halo_in)

        # Which steps are ours.
        start, stop = load_i32(schedule + 4 * row_block), load_i32(schedule + 4 * row_block + 4)
        all_steps = load_i32(schedule + 4 * row_blocks)
        chunks = schedule + 4 * (row_blocks + 1)
        begins = chunks + 4 * (all_steps + row_block * (warps * splits) + warp)
        first, last = start, stop
        if slices > 1:
            first = start + uint32((stop - start) * piece) // uint32(slices)
            last = start + uint32((stop - start) * (piece + 1)) // uint32(slices)
        oldest = max(start, first - 1)  # its columns may be left over for our first step

        # This thread copies one pixel of the patch, of every channels_at_once-th channel.
        pixel, copied_channel = thread % patch_rows, thread // patch_rows
        image, pixel_y, pixel_x = pixel // patch_area, pixel // patch_wide % patch_tall, pixel % patch_wide
        # What lies outside the map is left out: only output pixels outside the map would see it.
        copying = (
            copied_channel < channels_at_once
            and first_group + image < image_groups
            and top + pixel_y < height + 2 * halo_in
            and left + pixel_x < width + 2 * halo_in
        )
        source = x + ROW_BYTES * (
            ((first_group + image) * c_in + copied_channel) * plane_in + (top + pixel_y) * width_in + left + pixel_x
        )
        target = ring + copied_channel * channel_bytes + (image * image_rows + pixel_y * pitch + pixel_x) * ROW_BYTES

        acc = cuda.local.array(sums, float32)
        for i in range(sums):
            acc[i] = float32(0)
        group = load_i32(begins + 4 * (warps * splits) * first)
        now, ahead = cuda.local.array(fragments, uint32), cuda.local.array(fragments, uint32)
        for i in range(row_tiles):
            now[4 * i], now[4 * i + 1], now[4 * i + 2], now[4 * i + 3] = load_x4(
                weights + group * fragment_bytes + i * 512 + lane * 16
            )
        code = load_u16(columns + group * 2 * depth + (lane & codes) * 2)
        places = 0
        if sparse:
            places = load_u32(metadata + group * 128 + lane * 4)

        # Whatever the next turn of the loop asks global memory for is loaded a turn early.
        next_chunk, next_end = (
            load_i32(chunks + 4 * oldest),
            load_i32(begins + 4 * (warps * splits) * max(0, oldest - 1)),
        )
        for step in range(oldest - LOOK_AHEAD, last):
            coming = step + LOOK_AHEAD
            chunk, end = next_chunk * CHUNK, next_end
            next_chunk = load_i32(chunks + 4 * coming + 4)
            next_end = load_i32(begins + 4 * (warps * splits) * max(0, step + 2))
            wait_all_but_newest()
            cuda.syncthreads()
            if coming < last:
                place = target + (coming & (SLOTS - 1)) * slot_bytes
                address = source + chunk * (plane_in * ROW_BYTES)
                for i in range(copies):
                    channel = copied_channel + i * channels_at_once
                    if copying and channel < CHUNK and chunk + channel < c_in:
                        skip = i * channels_at_once
                        copy_async(place + skip * channel_bytes, address + skip * (plane_in * ROW_BYTES))
            commit_copies()
            while group < end:  # never before our first step: `end` is then the begin of an earlier one
                # Where this lane's column begins in shared memory.
                slot = (step - (code >> AGE_BIT)) & (SLOTS - 1)
                channel, tap = (code >> TAP_BITS) & (CHUNK - 1), code & ((1 << TAP_BITS) - 1)
                column = ring + slot * slot_bytes + channel * channel_bytes + tap * ROW_BYTES
                group = successor(group)
                for i in range(row_tiles):
                    ahead[4 * i], ahead[4 * i + 1], ahead[4 * i + 2], ahead[4 * i + 3] = load_x4(
                        weights + group * fragment_bytes + i * 512 + lane * 16
                    )
                code = load_u16(columns + group * 2 * depth + (lane & codes) * 2)
                if sparse:
                    places_now, places = places, load_u32(metadata + group * 128 + lane * 4)
                    for j in range(pixels):
                        offset = (j // (tall * wide) * image_rows + j // wide % tall * pitch + j % wide) * ROW_BYTES
                        b0, b1, b2, b3 = load_matrices_transposed(column + offset)
                        k = 4 * j
                        acc[k], acc[k + 1], acc[k + 2], acc[k + 3] = mma_sparse_low(
                            now[0], now[1], now[2], now[3], b0, b1, b2, b3,
                            acc[k], acc[k + 1], acc[k + 2], acc[k + 3], places_now,
                        )  # fmt: skip
                        k = 4 * (pixels + j)
                        acc[k], acc[k + 1], acc[k + 2], acc[k + 3] = mma_sparse_high(
                            now[4], now[5], now[6], now[7], b0, b1, b2, b3,
                            acc[k], acc[k + 1], acc[k + 2], acc[k + 3], places_now,
                        )  # fmt: skip
                else:
                    column += (lane >> 4) * ROW_BYTES  # pixels in pairs: the upper lanes address the second one
                    for j in range(0, pixels, 2):
                        offset = (j // (tall * wide) * image_rows + j // wide % tall * pitch + j % wide) * ROW_BYTES
                        b0, b1, b2, b3 = load_matrices_transposed(column + offset)
                        for i in range(row_tiles):
                            k, a = 4 * (i * pixels + j), 4 * i
                            acc[k], acc[k + 1], acc[k + 2], acc[k + 3] = mma(
                                now[a], now[a + 1], now[a + 2], now[a + 3], b0, b1,
                                acc[k], acc[k + 1], acc[k + 2], acc[k + 3],
                            )  # fmt: skip
                            acc[k + 4], acc[k + 5], acc[k + 6], acc[k + 7] = mma(
                                now[a], now[a + 1], now[a + 2], now[a + 3], b2, b3,
                                acc[k + 4], acc[k + 5], acc[k + 6], acc[k + 7],
                            )  # fmt: skip
                for i in range(fragments):
                    now[i] = ahead[i]

        # The upper half of the parts hands its sums to the lower half, until one part has them all.
        part, giving = warp // warps, splits >> 1
        while giving > 0:
            here = ring + 16 * (((part & (giving - 1)) * warps * handed + (warp & (warps - 1))) * WARP + lane)
            for begin in range(0, sums // 4, handed):
                cuda.syncthreads()  # the ring, or what was handed over before, is no longer read
                if giving <= part < 2 * giving:
                    for i in range(handed):
                        k = 4 * (begin + i)
                        store_shared_f32_x4(here + quad_bytes * i, acc[k], acc[k + 1], acc[k + 2], acc[k + 3])
                cuda.syncthreads()
                if part < giving:
                    for i in range(handed):
                        k = 4 * (begin + i)
                        s0, s1, s2, s3 = load_shared_f32_x4(here + quad_bytes * i)
                        acc[k] += s0
                        acc[k + 1] += s1
                        acc[k + 2] += s2
                        acc[k + 3] += s3
            giving >>= 1

        # Epilogue. Lane 4g+t holds images 2t and 2t+1 of each pixel, for output channels g and g+8 of each row tile.
        pair, block_row, first_part = lane & 3, warp * rows + (lane >> 2), warp < warps
        if slices > 1:
            block = ((piece * deep_patches + deep_patch) * cuda.gridDim.y + patch) * row_blocks + row_block
            mine = y + 16 * (block * (sums // 4 * WARP * warps) + thread)
            for k in range(0, sums, 4):
                if first_part:
                    store_f32_x4(mine + k * 4 * WARP * warps, acc[k], acc[k + 1], acc[k + 2], acc[k + 3])
            return

        height_out, width_out = height // shrink, width // shrink
        top, left = top // shrink, left // shrink
        pitch_out = width_out + 2 * halo
        plane_out = pitch_out * (height_out + 2 * halo)
        # Lane 4g+t will store pixels t, t+4 ... of channel g; where in a channel's maps they lie, or that they don't.
        places = cuda.local.array(stores, int64)
        for q in range(stores):
            j = 4 * q + pair
            image, oy, ox = first_group + j // area_out, top + j // wide_out % tall_out, left + j % wide_out
            places[q] = -1
            if j < pixels_out and image < image_groups and oy < height_out and ox < width_out:
                places[q] = (image * c_out * plane_out + (oy + halo) * pitch_out + ox + halo) * ROW_BYTES
        mine = ring + warp * out_bytes + (lane >> 2) * ROW_BYTES
        cuda.syncthreads()  # the ring is free
        if splits == 1 or first_part:
            for i in range(row_tiles):
                for h in range(2):
                    channel = row_block * block_rows + block_row + i * 16 + h * 8
                    shift = load_f32(bias + 4 * channel)
                    for j in range(pixels_out):
                        if pool:
                            corner = (j // area_out * tall + j // wide_out % tall_out * 2) * wide + j % wide_out * 2
                            k, below = 4 * (i * pixels + corner) + 2 * h, 4 * wide
                            even = maximum(maximum(acc[k], acc[k + 4]), maximum(acc[k + below], acc[k + below + 4]))
                            odd = maximum(
                                maximum(acc[k + 1], acc[k + 5]), maximum(acc[k + below + 1], acc[k + below + 5])
                            )
                        else:
                            k = 4 * (i * pixels + j) + 2 * h
                            even, odd = acc[k], acc[k + 1]
                        if relu:
                            halves = pack_halves_relu(even + shift, odd + shift)
                        else:
                            halves = pack_halves(even + shift, odd + shift)
                        store_shared(mine + j * out_pitch + pair * 4, halves)
                    cuda.syncwarp()
                    maps = y + channel * plane_out * ROW_BYTES
                    for q in range(stores):
                        if channel < c_out and places[q] >= 0:
                            r0, r1, r2, r3 = load_shared_x4(mine + (4 * q + pair) * out_pitch)
                            store_x4(maps + places[q], r0, r1, r2, r3)
                    cuda.syncwarp()

        # A patch at the border also writes the halo next to it.
        pixel = thread % window
        oy, ox = top + pixel // (wide_out + 2) - 1, left + pixel % (wide_out + 2) - 1
        border = oy == -1 or oy == height_out or ox == -1 or ox == width_out
        if halo and border and oy <= height_out and ox <= width_out and thread < threads // window * window:
            for i in range(thread // window, block_rows * deep, threads // window):
                image, channel = first_group + i % deep, row_block * block_rows + i // deep
                if channel < c_out and image < image_groups:
                    row = (image * c_out + channel) * plane_out + (oy + 1) * pitch_out + ox + 1
                    store_x4(y + row * ROW_BYTES, 0, 0, 0, 0)

    return tensor_core


def reduce_kernel(tile: Tile):
    """Finishes what `tensor_core_kernel` computed in slices: adds them up, then max-pool, bias, ReLU, halo.

    A thread makes one output pixel of 8 images. Block: any; grid: as many threads as ``groups * C_out`` planes, halo
    included, have pixels. `blocks` is the number of blocks in a slice.
    """
    tall, wide, deep, pixels, rows, block_rows = (
        tile.tall,
        tile.wide,
        tile.deep,
        tile.pixels,
        tile.rows,
        tile.block_rows,
    )
    threads, sums, shrink, relu = WARP * tile.warps, tile.row_tiles * tile.pixels * 4, 1 + tile.pool, tile.relu

    def reduce(
        partial, y, bias, slices, blocks, row_blocks, image_groups, c_out, height, width, halo
    ):  # fmt: skip
        height_out, width_out = height // shrink, width // shrink
        pitch_out = width_out + 2 * halo
        plane_out = pitch_out * (height_out + 2 * halo)
        place = cuda.grid(1)
        plane, pixel = place // plane_out, place % plane_out
        image, channel = plane // c_out, plane % c_out
        oy, ox = pixel // pitch_out - halo, pixel % pitch_out - halo
        if image >= image_groups:
            return
        if oy < 0 or oy >= height_out or ox < 0 or ox >= width_out:
            store_x4(y + place * ROW_BYTES, 0, 0, 0, 0)
            return
        patches_wide, patches_tall = (width + wide - 1) // wide, (height + tall - 1) // tall
        row = channel % block_rows
        lane = row // rows * WARP + row % 8 * 4  # the first of the four that hold this row
        best, acc = cuda.local.array(IMAGES, float32), cuda.local.array(IMAGES, float32)
        for i in range(IMAGES):
            best[i] = float32(-float("inf"))
        for p in range(shrink * shrink):
            iy, ix = oy * shrink + p // shrink, ox * shrink + p % shrink
            patch = (image // deep * patches_tall + iy // tall) * patches_wide + ix // wide
            j = (image % deep * tall + iy % tall) * wide + ix % wide
            block = patch * row_blocks + channel // block_rows
            for i in range(IMAGES):
                acc[i] = float32(0)
            for piece in range(slices):
                quads = (piece * blocks + block) * (sums // 4) + row % rows // 16 * pixels + j
                mine = partial + 16 * (quads * threads + lane) + row % 16 // 8 * 8
                for i in range(4):
                    even, odd = load_f32_x2(mine + 16 * i)
                    acc[2 * i] += even
                    acc[2 * i + 1] += odd
            for i in range(IMAGES):
                best[i] = maximum(best[i], acc[i])
        shift = load_f32(bias + 4 * channel)
        for i in range(IMAGES):
            best[i] += shift
            if relu:
                best[i] = maximum(best[i], float32(0))
        store_x4(
            y + place * ROW_BYTES, pack_halves(best[0], best[1]), pack_halves(best[2], best[3]),
            pack_halves(best[4], best[5]), pack_halves(best[6], best[7]),
        )  # fmt: skip

    return reduce


def scalar_kernel(taps: int, pool: bool, relu: bool):
    """The kernel for single weights: no tensor cores, no shared memory.

    A thread makes one output pixel of 8 images; a warp reads a weight once and 512 bytes of activations with it.
    Block: any; grid: ``(enough threads for all output pixels of all image groups, halo included; C_out)``.
    """
    halo_in = taps // 2
    window = 1 + pool
    convolved, sums = window * window, window * window * IMAGES  # pixels and sums per thread

    def scalar(x, y, weights, columns, starts, bias, c_in, height, width, c_out, image_groups, halo):
        height_out, width_out = height // window, width // window
        pitch_out = width_out + 2 * halo
        plane_out = pitch_out * (height_out + 2 * halo)
        width_in, plane_in = width + 2 * halo_in, (width + 2 * halo_in) * (height + 2 * halo_in)
        channel, image, pixel = cuda.blockIdx.y, cuda.grid(1) // plane_out, cuda.grid(1) % plane_out
        oy, ox = pixel // pitch_out - halo, pixel % pitch_out - halo
        if image >= image_groups:
            return
        place = y + ((image * c_out + channel) * plane_out + pixel) * ROW_BYTES
        if oy < 0 or oy >= height_out or ox < 0 or ox >= width_out:
            store_x4(place, 0, 0, 0, 0)
            return
        acc = cuda.local.array(sums, float32)
        for i in range(sums):
            acc[i] = float32(0)
        corner = x + (image * c_in * plane_in + oy * window * width_in + ox * window) * ROW_BYTES
        for k in range(load_i32(starts + 4 * channel), load_i32(starts + 4 * channel + 4)):
            column, weight = load_i32(columns + 4 * k), load_f32(weights + 4 * k)
            row = corner + ((column >> 4) * plane_in + (column >> 2 & 3) * width_in + (column & 3)) * ROW_BYTES
            for p in range(convolved):
                pairs = load_x4(row + (p // window * width_in + p % window) * ROW_BYTES)
                for i in range(4):
                    even, odd = unpack_halves(pairs[i])
                    acc[p * IMAGES + 2 * i] += weight * even
                    acc[p * IMAGES + 2 * i + 1] += weight * odd
        for p in range(1, convolved):
            for i in range(IMAGES):
                acc[i] = maximum(acc[i], acc[p * IMAGES + i])
        shift = load_f32(bias + 4 * channel)
        for i in range(IMAGES):
            acc[i] += shift
            if relu:
                acc[i] = maximum(acc[i], float32(0))
        store_x4(
            place, pack_halves(acc[0], acc[1]), pack_halves(acc[2], acc[3]),
            pack_halves(acc[4], acc[5]), pack_halves(acc[6], acc[7]),
        )  # fmt: skip

    return scalar


# name -> factory, types of the kernel's arguments. Pointers first:
#   x, y (or partial sums), weights, metadata, columns, schedule, bias; C_in, H, W, C_out, groups, halo, slices
#   partial sums, y, bias; slices, blocks, row blocks, groups, C_out, H, W, halo
#   x, y, weights, columns, row starts, bias; C_in, H, W, C_out, groups, halo
KERNELS = {
    name: (factory, (types.int64,) * pointers + (types.int32,) * sizes)
    for name, factory, pointers, sizes in (
        ("tensor_core", tensor_core_kernel, 7, 7),
        ("reduce", reduce_kernel, 3, 8),
        ("scalar", scalar_kernel, 6, 6),
    )
}
