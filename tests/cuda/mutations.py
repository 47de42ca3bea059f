"""Faults planted in copies of the CUDA sources, which the proof must find: at least three per kernel.

A proof that passes on a broken kernel proves nothing. Kinds: a wrong index, a missing barrier or fence, a tail that is
off by one, and reads or writes out of bounds.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault: `old` becomes `new` in csrc/cuda/`file`, seen by `source`; `proof` must fail."""

    name: str
    proof: str
    file: str
    old: str
    new: str
    source: str
    flavour: str = "traced"


PACK, LINEAR, LSTM = "strips_pack.cu", "strips_linear_bf16.cu", "strips_lstm.cu"
MUTATIONS = (
    # strips_count, strips_sum, strips_fill
    Mutation("count: wrong index", "pack", PACK, "list / args.chunks, k)))", "list % args.strips, k)))", PACK),
    Mutation(
        "count: tail",
        "pack",
        PACK,
        "int count = 0;\n  for (int first = 0; first < kChunk",
        "int count = 0;\n  for (int first = 0; first < kChunk - 32",
        PACK,
    ),
    Mutation("count: last octet", "pack", PACK, "= octets_of(count);", "= count / 8;", PACK),
    Mutation(
        "sum: missing barrier",
        "pack",
        PACK,
        "    if (lane == 31) sums[warp] = sum;\n    __syncthreads();",
        "    if (lane == 31) sums[warp] = sum;",
        PACK,
    ),
    Mutation(
        "sum: missing barrier before the next round",
        "pack",
        PACK,
        "before += all;\n    __syncthreads();",
        "before += all;",
        PACK,
    ),
    Mutation("sum: carry", "pack", PACK, "args.begin[i + 1] = before + sum", "args.begin[i + 1] = sum", PACK),
    Mutation("fill: wrong index", "pack", PACK, "n % 8 * 4 + (k", "n % 8 + 8 * (k", PACK),
    Mutation("fill: missing barrier", "pack", PACK, "  __syncwarp();", "  ", PACK),
    Mutation("fill: tail", "pack", PACK, "place < octets * 8", "place < octets * 8 - 1", PACK),
    # strips_linear
    Mutation("linear: wrong index", "linear", "strips.cuh", "(lane >> 4 << 3)", "(lane >> 3 << 3 & 8)", LINEAR),
    Mutation("linear: wrong swizzle", "linear", "strips.cuh", "bank_of(k) >> kShift)", "(k & 3) >> kShift)", LINEAR),
    Mutation(
        "linear: missing barrier behind the tile",
        "linear",
        "strips_linear.cuh",
        "w.k, vectors_in);\n        __syncthreads();",
        "w.k, vectors_in);",
        LINEAR,
    ),
    Mutation(
        "linear: missing barrier before the next tile",
        "linear",
        "strips_linear.cuh",
        "__syncthreads();  // everybody is done with what the tile held",
        "",
        LINEAR,
    ),
    Mutation("linear: tail octet", "linear", "strips.cuh", "if (o < end) {", "if (o + 1 < end) {", LINEAR),
    Mutation("linear: rows", "linear", "strips.cuh", "if (m >= rows ||", "if (m > rows ||", LINEAR, "address"),
    Mutation(
        "linear: store behind the last output",
        "linear",
        "strips_linear.cuh",
        "if (n + i < args.weight.n) y[i]",
        "if (n + i <= args.weight.n) y[i]",
        LINEAR,
    ),
    Mutation(
        "linear: base of x not looked at",
        "linear",
        "strips_linear.cuh",
        "reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && ",
        "",
        LINEAR,
    ),
    Mutation(
        "linear: base of the residual not looked at",
        "linear",
        "strips_linear.cuh",
        "w.n % 4 == 0 && reinterpret_cast<uintptr_t>(args.residual) % 16 == 0",
        "w.n % 4 == 0",
        LINEAR,
    ),
    Mutation(
        "linear: offset of x in 32 bits",
        "linear",
        "strips.cuh",
        "static_cast<const Bits*>(x) + m * stride + k",
        "static_cast<const Bits*>(x) + static_cast<int>(m * stride + k)",
        LINEAR,
        "address",
    ),
    Mutation(
        "linear: offset of y in 32 bits",
        "linear",
        "strips_linear.cuh",
        "static_cast<Bits*>(args.y) + at",
        "static_cast<Bits*>(args.y) + static_cast<int>(at)",
        LINEAR,
        "address",
    ),
    Mutation(
        "linear: the first inputs alone",
        "linear",
        "strips_linear.cuh",
        "chunk0 < w.chunks; chunk0 += stage",
        "chunk0 < stage; chunk0 += stage",
        LINEAR,
    ),
    # mask_lists
    Mutation(
        "lists: wrong index", "lists", "lists.cu", "__popc(lanes & ((1u << lane) - 1))", "__popc(lanes)", "lists.cu"
    ),
    Mutation("lists: missing wait", "lists", "lists.cu", "wait_for(work.tickets, half)", "", "lists.cu"),
    Mutation("lists: waits for one too few", "lists", "lists.cu", "tickets, half)", "tickets, half - 1)", "lists.cu"),
    Mutation(
        "lists: one thread's missing fences",
        "lists",
        "lists.cu",
        "  __threadfence();\n  __syncthreads();",
        "  if (threadIdx.x == 0) __threadfence();\n  __syncthreads();",
        "lists.cu",
    ),
    Mutation("lists: missing fence", "lists", "lists.cu", "  __threadfence();\n  __sync", "  __sync", "lists.cu"),
    Mutation(
        "lists: missing barrier",
        "lists",
        "lists.cu",
        "count_column(layer, c, r0, r1);\n  __syncthreads();\n  if (!fits)",
        "count_column(layer, c, r0, r1);\n  if (!fits)",
        "lists.cu",
    ),
    Mutation(
        "lists: tail",
        "lists",
        "lists.cu",
        "r0 + share : layer.rows;\n  int* b",
        "r0 + share : r0;\n  int* b",
        "lists.cu",
    ),
    # strips_lstm_step
    Mutation("lstm: wrong index", "lstm", "strips_lstm.cu", "(gate * octets + octet)", "(octet * kGates + gate)", LSTM),
    Mutation(
        "lstm: missing barrier",
        "lstm",
        "strips_lstm.cu",
        "  __syncthreads();\n\n  // Thread 32 i + lane",
        "\n  // Thread 32 i + lane",
        LSTM,
    ),
    Mutation("lstm: missing fence", "lstm", "strips_lstm.cu", "  __threadfence();\n  __sync", "  __sync", LSTM),
    Mutation(
        "lstm: base of h not looked at",
        "lstm",
        "strips_lstm.cu",
        "return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride",
        "(void)at;\n    return stride",
        LSTM,
    ),
    Mutation("lstm: tail", "lstm", "strips_lstm.cu", "m < args.rows) {", "m <= args.rows) {", LSTM, "address"),
    Mutation("lstm: rows of a tile", "lstm", "strips_lstm.cu", "r < kRows && m0", "r < kRows - 1 && m0", LSTM),
)
