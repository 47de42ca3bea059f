"""Kernels broken on purpose, one place at a time: a test of the suite must see each.

Reads and writes outside the tensors and between programs are seen because the interpreter's memory is watched
(watched_memory.py). What this cannot show, because it runs a program as one thread: races within one. A barrier left
out is looked for in the machine code instead; on a device compute-sanitizer looks (benchmarks/gpu).
"""

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sparse_pathways.kernels import ffn
from sparse_pathways.kernels.schedule import Schedule

F32 = torch.float32
EDGES = ((5, 77, 192), (16, 32))  # N ends inside a block
FULL = ((37, 128, 128), (32, 32))


class Mutation(NamedTuple):
    """A file of kernels/, the text replaced, its replacement, and (file, test, arguments) of the test that sees it."""

    file: str
    old: str
    new: str
    test: tuple


def equals_dense(case, dense=False):
    return ("test_products", "test_products_equal_dense", (*case, dense, F32))


def pathways(cut, dense=False, shape=(37, 96, 64), block=(16, 16), count=4):
    test = "test_forward_and_dx_equal_a_loop_over_pathways"
    return ("test_pathways", test, (shape, block, count, dense, F32, cut))


def far(file, *arguments, test="test_far_rows"):
    """The test of a file whose elements lie past 2**31."""
    return (file, test, arguments)


STRIDED = ("test_products", "test_rows_with_a_stride_and_nan_behind_the_last_element")
PARTS = ("test_products", "test_weight_gradient_in_parts", (3, True))
PACKED_PARTS = ("test_products", "test_weight_gradient_in_parts", (3, False))
LEAK = ("test_pathways", "test_a_nan_of_another_pathway_stays_there")
MASK = ("test_masked_weight", "test_equals_where", ((37, 53), (3, 5), F32, F32))
FFN = ("test_ffn", "test_equals_two_products", ((5, 61, 77, 83), ((32, 16), (16, 32)), 1, F32, True))
EPILOGUE = ("test_products", "test_activation_and_residual", (0, F32))
UNION_EDGES = pathways("union", True, (5, 77, 83), (16, 32), 3)
FAR_UNION, FAR_SEGMENTS = (far("test_pathways", cut, test="test_far_rows_and_blocks") for cut in ("union", "segments"))
FAR_WEIGHT = far("test_products", test="test_a_far_weight")
LARGER = ("test_products", "test_a_block_larger_than_the_tile", ((64, 32), 16))

LOOP, LINEAR, DW, MASKED = "block_product.py", "bcsr_linear.py", "bcsr_linear_dw.py", "masked_weight.py"
PATHWAY, FUSED = "pathway_linear.py", "ffn.py"

MUTATIONS = {
    # the loop that forward, dX, segments and the FFN share
    "loop_wrong_block": Mutation(LOOP, "index_ptr + entry", "index_ptr + begin", equals_dense(FULL)),
    "loop_no_tail_of_x": Mutation(LOOP, "in_m & (k[None, :] < N_RED)", "in_m", (*STRIDED, (F32, False))),
    "loop_no_tail_of_w": Mutation(LOOP, "(k[:, None] < N_RED) & ", "", (*STRIDED, (F32, True))),
    "loop_no_output_tail_of_w": Mutation(
        LOOP,
        "in_w = (k[:, None] < N_RED) & (o[None, :] < N_OUT)",
        "in_w = k[:, None] < N_RED",
        equals_dense(EDGES, dense=True),
    ),
    "loop_rows_past_the_last": Mutation(
        LOOP, "mask=in_m & (k[None, :] < N_RED)", "mask=k[None, :] < N_RED", equals_dense(FULL)
    ),
    "loop_block_in_32_bits": Mutation(
        LOOP, "tl.load(pos_ptr + entry)).to(tl.int64)", "tl.load(pos_ptr + entry))", FAR_WEIGHT
    ),
    "loop_output_in_32_bits": Mutation(LOOP, "o[None, :].to(tl.int64)", "o[None, :]", FAR_WEIGHT),
    "loop_input_in_32_bits": Mutation(LOOP, "k[:, None].to(tl.int64)", "k[:, None]", FAR_WEIGHT),
    "loop_forgets_the_sum": Mutation(LOOP, "tl.dot(x, w, acc, ", "tl.dot(x, w, ", equals_dense(FULL)),
    "loop_ignores_pos": Mutation(
        LOOP,
        "entry if pos_ptr is None else tl.load(pos_ptr + entry)",
        "entry",
        ("test_products", "test_pos_selects_blocks_and_leaves_the_others_unread", ()),
    ),
    "loop_wrong_step": Mutation(LOOP, "step % STEPS * TILE_RED", "step % STEPS * 16", LARGER),
    "epilogue_wrong_stride": Mutation(LOOP, "m[:, None] * residual_stride_m", "m[:, None] * y_stride_m", EPILOGUE),
    "epilogue_bias_past_the_last": Mutation(LOOP, "o[None, :], mask=in_o, other=0.0)", "o[None, :])", EPILOGUE),
    "epilogue_residual_past_the_last_output": Mutation(
        LOOP, "tl.load(place, mask=in_m & in_o", "tl.load(place, mask=in_m", EPILOGUE
    ),
    "epilogue_residual_past_the_last_row": Mutation(
        LOOP, "tl.load(place, mask=in_m & in_o", "tl.load(place, mask=in_o", EPILOGUE
    ),
    "epilogue_wrong_constant": Mutation(
        LOOP, "0.7071067811865476", "0.7978845608", ("test_products", "test_activation_and_residual", (2, F32))
    ),
    "epilogue_wrong_sign": Mutation(
        LOOP, "-far, far", "far, far", ("test_products", "test_activation_and_residual", (4, F32))
    ),
    # forward and dX
    "linear_last_row": Mutation(LINEAR, "m[:, None] < M", "m[:, None] < M - 1", equals_dense(FULL)),
    "linear_tile_in_32_bits": Mutation(
        LINEAR, "(tl.program_id(0) // strips).to(tl.int64)", "tl.program_id(0) // strips", far("test_products")
    ),
    "linear_empty_list": Mutation(
        LINEAR, "strip * TILE_OUT // OUT + 1)", "strip * TILE_OUT // OUT)", equals_dense(FULL)
    ),
    "linear_wrong_strip": Mutation(
        LINEAR, "begin = tl.load(start_ptr + strip * TILE_OUT // OUT)", "begin = tl.load(start_ptr + strip)", LARGER
    ),
    "dx_dense_not_transposed": Mutation(
        LINEAR, "(values.stride(1), values.stride(0))", "values.stride()", equals_dense(FULL, dense=True)
    ),
    "dx_packed_not_transposed": Mutation(LINEAR, "(c, r), (r, 1)", "(c, r), (1, r)", equals_dense(FULL)),
    # dW
    "dw_last_entry": Mutation(DW, "entry >= count:", "entry >= count - 1:", equals_dense(FULL)),
    "dw_last_row": Mutation(DW, "used = m < last", "used = m < last - 1", equals_dense(FULL)),
    "dw_rows_in_32_bits": Mutation(
        DW, "tl.arange(0, TILE_M).to(tl.int64)", "tl.arange(0, TILE_M)", far("test_products")
    ),
    "dw_pathway_past_the_last_row": Mutation(
        DW,
        "tl.load(pathway_ptr + m, mask=used, other=0)",
        "tl.load(pathway_ptr + m)",
        ("test_pathways", "test_weight_gradient_sums_the_rows_that_use_a_block", (1, True)),
    ),
    "dw_block_transposed": Mutation(
        DW, "c[None, :] * R + r[:, None]", "r[:, None] * C + c[None, :]", equals_dense(FULL)
    ),
    "dw_one_part_for_all": Mutation(DW, "        part_ptr += stride_split\n", "", PARTS),
    "dw_parts_in_one_place": Mutation(DW, "split * (tl.num_programs(0) // TILES) + block", "block", PACKED_PARTS),
    "dw_no_tail": Mutation(DW, "used[:, None] & (k[None, :] < K)", "used[:, None]", (*STRIDED, (F32, False))),
    "dw_sum_of_last_entry": Mutation(
        DW, "if entry >= tl.load(count_ptr):", "if entry >= tl.load(count_ptr) - 1:", PARTS
    ),
    "dw_sum_transposed": Mutation(
        DW, "inside = c[:, None] * R + r[None, :]", "inside = r[None, :] * C + c[:, None]", PARTS
    ),
    # mask and cast
    "mask_bits_reversed": Mutation(MASKED, "(block & 7).to", "(7 - (block & 7)).to", MASK),
    "mask_wrong_grid": Mutation(MASKED, "tl.cdiv(K, C) + (k", "(K // C) + (k", MASK),
    "mask_row_in_32_bits": Mutation(MASKED, "n[:, None].to(tl.int64)\n", "n[:, None]\n", far("test_masked_weight")),
    "mask_reads_pruned": Mutation(MASKED, "mask=inside & kept", "mask=inside", MASK),
    # rows of several pathways
    "union_leaks_nan": Mutation(
        PATHWAY,
        "tl.where(mine[:, None], tl.dot(x, w, input_precision=PRECISION), 0.0)",
        "tl.dot(x, w, input_precision=PRECISION)",
        (*LEAK, ("union",)),
    ),
    "union_bits_of_the_entry": Mutation(PATHWAY, "bits_ptr + block", "bits_ptr + entry", pathways("union")),
    "union_first_pathway_only": Mutation(PATHWAY, ">> pathway) & 1", ">> 0) & 1", pathways("union")),
    "union_no_tail_of_x": Mutation(
        PATHWAY, "mask=mine[:, None] & (k[None, :] < N_RED)", "mask=mine[:, None]", UNION_EDGES
    ),
    "union_no_tail_of_w": Mutation(PATHWAY, "mask=(k[:, None] < N_RED) & (o", "mask=(o", UNION_EDGES),
    "union_no_output_tail_of_w": Mutation(
        PATHWAY, "mask=(k[:, None] < N_RED) & (o[None, :] < N_OUT)", "mask=k[:, None] < N_RED", UNION_EDGES
    ),
    "union_pathway_past_the_last_row": Mutation(
        PATHWAY, "tl.load(pathway_ptr + m, mask=in_m, other=0)", "tl.load(pathway_ptr + m)", UNION_EDGES
    ),
    "union_tile_in_32_bits": Mutation(
        PATHWAY, "(tl.program_id(0) // strips).to(tl.int64)", "(tl.program_id(0) // strips)", FAR_UNION
    ),
    "union_block_in_32_bits": Mutation(
        PATHWAY, "tl.load(pos_ptr + entry)).to(tl.int64)", "tl.load(pos_ptr + entry))", FAR_UNION
    ),
    "segment_order_past_the_tile": Mutation(
        PATHWAY,
        "tl.load(order_ptr + place, mask=place < last, other=0)",
        "tl.load(order_ptr + place)",
        pathways("segments"),
    ),
    "segment_rows_in_32_bits": Mutation(
        PATHWAY, "mask=place < last, other=0).to(tl.int64)", "mask=place < last, other=0)", FAR_SEGMENTS
    ),
    "segment_last_row": Mutation(PATHWAY, "in_m = (place < last)", "in_m = (place < last - 1)", pathways("segments")),
    "segment_wrong_list": Mutation(
        PATHWAY, "pathway * (tl.cdiv(N_OUT, OUT) + 1)", "pathway * tl.cdiv(N_OUT, OUT)", pathways("segments")
    ),
    "segment_wrong_tile": Mutation(
        PATHWAY,
        "torch.searchsorted(tiles, number, right=True)",
        "torch.searchsorted(tiles, number)",
        pathways("segments"),
    ),
    # FFN
    "ffn_skips_a_tile": Mutation(
        FUSED,
        "tl.cdiv(M, TILE_M), tl.num_programs(0))",
        "tl.cdiv(M, TILE_M) - 1, tl.num_programs(0))",
        FFN,
    ),
    "ffn_one_scratch_for_all_programs": Mutation(
        FUSED,
        "hidden_ptr + tl.program_id(0).to(tl.int64) * TILE_M * H",
        "hidden_ptr",
        ("test_ffn", "test_every_program_has_a_scratch_of_its_own", ()),
    ),
    "ffn_rows_in_32_bits": Mutation(
        FUSED, "tl.arange(0, TILE_M).to(tl.int64)", "tl.arange(0, TILE_M)", far("test_ffn")
    ),
    "ffn_second_weight_transposed": Mutation(
        FUSED,
        "            w2_stride_out,\n            w2_stride_red,\n            R2",
        "            w2_stride_red,\n            w2_stride_out,\n            R2",
        FFN,
    ),
    "ffn_activation_twice": Mutation(
        FUSED, "            0,\n            TILE_M", "            1,\n            TILE_M", FFN
    ),
}


@pytest.fixture(scope="module")
def suite(load_module):
    return {name: load_module(name) for name in {mutation.test[0] for mutation in MUTATIONS.values()}}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_kernel_is_seen(suite, interpreted, problem, tmp_path, mutation):
    file, name, arguments = mutation.test
    test = getattr(suite[file], name)
    test(interpreted, problem, *arguments)
    with interpreted.mutated(mutation.file, mutation.old, mutation.new, tmp_path):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test(interpreted, problem, *arguments)


@pytest.mark.parametrize("left", [0, 1])
def test_a_missing_barrier_is_seen(load_module, machine_code, tmp_path, monkeypatch, left):
    """Either of the two barriers of the FFN left out."""
    suite = load_module("test_machine_code")
    suite.test_the_barriers_between_the_two_products_of_the_ffn(machine_code)
    barrier = "        tl.debug_barrier()"
    before, between, after = Path(ffn.__file__).read_text().split(barrier)
    broken = tmp_path / FUSED
    broken.write_text(barrier.join([before + between, after] if left else [before, between + after]))
    spec = importlib.util.spec_from_file_location("broken_ffn", broken)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "broken_ffn", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(suite, "ffn", module)
    with pytest.raises(AssertionError):
        suite.test_the_barriers_between_the_two_products_of_the_ffn(machine_code)


def test_the_pipeline_of_one_stage_is_seen(load_module, machine_code):
    """A depth that loads nothing ahead leaves no cp.async."""
    suite = load_module("test_machine_code")
    one = Schedule(128, 64, 64, num_warps=4, num_stages=1)
    with pytest.raises(AssertionError, match="no load in flight"):
        call = lambda: suite.product(16384, (64, 64), torch.bfloat16, False, one)  # noqa: E731
        suite.inspect(machine_code, 90, call, torch.bfloat16, True)
