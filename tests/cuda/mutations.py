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


LINEAR, LSTM = "strips_linear_bf16.cu", "strips_lstm.cu"
MUTATIONS = (
    # strips_pack
    Mutation("pack: wrong index", "pack", "strips_pack.cu", "n % 8 * 4 + (k", "n % 8 + 8 * (k", "strips_pack.cu"),
    Mutation("pack: missing barrier", "pack", "strips_pack.cu", "  __syncwarp();", "  ", "strips_pack.cu"),
    Mutation(
        "pack: missing barrier in the sum",
        "pack",
        "strips_pack.cu",
        "    if (lane == 31) sums[warp] = sum;\n    __syncthreads();",
        "    if (lane == 31) sums[warp] = sum;",
        "strips_pack.cu",
    ),
    Mutation("pack: tail", "pack", "strips_pack.cu", "place < octets * 8", "place < octets * 8 - 1", "strips_pack.cu"),
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
    # mask_lists
    Mutation(
        "lists: wrong index", "lists", "lists.cu", "__popc(lanes & ((1u << lane) - 1))", "__popc(lanes)", "lists.cu"
    ),
    Mutation("lists: missing wait", "lists", "lists.cu", "wait_for(work.tickets, half)", "", "lists.cu"),
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
    Mutation("lstm: tail", "lstm", "strips_lstm.cu", "m < args.rows) {", "m <= args.rows) {", LSTM, "address"),
    Mutation("lstm: rows of a tile", "lstm", "strips_lstm.cu", "r < kRows && m0", "r < kRows - 1 && m0", LSTM),
)
