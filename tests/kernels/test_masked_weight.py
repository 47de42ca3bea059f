"""Mask and cast in one pass, under the interpreter: exact, for any block."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

FUNCTION = "masked_weight.masked_weight"


def bits_of(mask):
    flat = mask.flatten().tolist()
    return torch.tensor(
        [sum(flat[i + b] << b for b in range(min(8, len(flat) - i))) for i in range(0, len(flat), 8)] or [],
        dtype=torch.uint8,
    )


# The interpreter truncates where a GPU rounds to bfloat16: that conversion is checked on a device.
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("block", [(8, 1), (16, 16), (3, 5), (1, 1), (64, 32)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("shape", [(40, 300), (37, 53), (1, 1), (17, 513)], ids="N{0[0]}-K{0[1]}".format)
def test_equals_where(interpreted, problem, shape, block, source, dtype):
    n, k = shape
    case = problem((1, n, k), block, source)
    wide = torch.full((n, k + 3), torch.nan, dtype=source)
    wide[:, :k] = case.weight  # pruned weights are NaN already
    out = interpreted(FUNCTION, weight=wide[:, :k], bits=bits_of(case.mask), block=block, dtype=dtype)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, case.dense.float().to(dtype))


def test_far_rows(interpreted, problem):
    """From row 32 on past element 2**31."""
    case = problem((1, 40, 300))
    given = {"weight": case.weight, "bits": bits_of(case.mask), "block": case.block}
    assert torch.equal(interpreted.far(FUNCTION, "weight", **given), case.dense.float())


def test_empty(interpreted):
    out = interpreted(FUNCTION, weight=torch.zeros(0, 8), bits=torch.zeros(0, dtype=torch.uint8), block=(8, 1))
    assert out.shape == (0, 8)
