"""Where the CUDA C++ kernels are chosen and how their strips are kept; the kernels themselves: tests/cuda."""

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.checks import BackendUnavailable
from sparse_pathways.ops import backends, library, strips

BF16 = torch.bfloat16


@pytest.fixture
def with_kernels(monkeypatch):
    """As if there were a device for them."""
    monkeypatch.setattr(library, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.fixture
def packs(monkeypatch):
    """The calls of the pack kernel, as (number of blocks, height); strips of 16 need half the octets of 8."""
    calls = []

    def pack(packed, index, p):
        calls.append((index.col.numel(), p))
        octets = index.col.numel() * packed.block[0] // p
        return strips.Strips(torch.empty(octets, 8 * p), torch.empty(octets, 8), index.crow, p)

    monkeypatch.setattr(strips, "_pack", pack)
    return calls


def packed(block=(8, 1), dtype=BF16, pathways=("a", "b")):
    torch.manual_seed(0)
    weight = torch.randn(64, 40, dtype=dtype)
    grid = (64 // block[0], 40 // block[1])
    return sp.PackedWeight.pack(weight, {name: torch.rand(grid) < 0.5 for name in pathways}, block)


def test_without_a_device_the_reason_is_said():
    assert library.CUDA_MISSING is not None or torch.cuda.is_available()
    if library.CUDA_MISSING is not None:
        assert library.CUDA_MISSING in strips.refusal(BF16, (8, 1))


@pytest.mark.usefixtures("with_kernels")
def test_tall_blocks_go_to_cuda_and_square_ones_to_triton():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert backends.select("cuda", BF16, (8, 1)) == "cuda"
    assert backends.select("cuda", torch.float32, (16, 1)) == "cuda"
    assert backends.select("cuda", BF16, (32, 32)) == "triton"
    assert backends.select("cuda", BF16, (4, 4)) == "reference"
    assert "multiple of 8" in backends.explain_product("cuda", BF16, (4, 4))


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    ("dtype", "block", "words"),
    [(torch.float64, (8, 1), "float64"), (BF16, (4, 1), "multiple of 8"), (torch.int8, (8, 1), "int8")],
)
def test_what_the_kernels_refuse(dtype, block, words):
    assert words in strips.refusal(dtype, block)


@pytest.mark.usefixtures("with_kernels")
def test_a_chip_without_room_for_the_tiles_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    assert "sm_89" in strips.refusal(BF16, (8, 1))


def test_a_forced_cuda_backend_refuses_tensors_of_the_cpu():
    with backends.forced("cuda"), pytest.raises(sp.BackendUnavailable, match="runs on CUDA devices"):
        sp.sparse_linear(torch.randn(3, 40, dtype=BF16), packed(), pathway="a")


def test_strips_are_made_once_per_pathway_and_again_when_values_change(packs):
    weight = packed()
    a, b = (weight.index(name) for name in ("a", "b"))
    first = strips.strips_of(weight, a)
    assert strips.strips_of(weight, a) is first
    assert strips.strips_of(weight, b) is not first
    before = len(packs)
    weight.values.mul_(2)
    assert strips.strips_of(weight, a) is not first
    assert len(packs) > before


@pytest.mark.parametrize(("rows", "height"), [(8, 16), (16, 16), (32, 32), (64, 32)])
def test_height_of_strips(packs, rows, height):
    """8-high blocks: 16, as the pack kernel finds half the octets there."""
    weight = packed((rows, 1), pathways=("a",))
    assert strips.strips_of(weight, weight.index()).p == height
    assert strips.strips_of(weight, weight.index(), 8).p == 8


def test_shapes_of_the_operators_without_a_kernel():
    ops = torch.ops.sparse_pathways
    x = torch.empty(5, 40, device="meta", dtype=BF16)
    octets = (torch.empty(7, 64, device="meta", dtype=BF16), torch.empty(7, 8, device="meta", dtype=torch.uint16))
    begin = torch.empty(9, device="meta", dtype=torch.int32)
    y = ops.strips_linear(x, *octets, begin, None, None, 64, 8)
    assert y.shape == (5, 64) and y.dtype == BF16
    crow, col = torch.empty(9, device="meta", dtype=torch.int32), torch.empty(50, device="meta", dtype=torch.uint16)
    blocks = torch.empty(50, 1, 8, device="meta", dtype=BF16)
    values, ids, starts, needed = ops.strips_pack(blocks, crow, col, None, 64, 600, 8, 1, 16, 30)
    assert values.shape == (30, 128) and values.dtype == BF16 and ids.shape == (30, 8) and ids.dtype == torch.uint16
    assert starts.shape == (4 * 2 + 1,) and needed.shape == (1,)
    steps, h = torch.empty(3, 5, 40, device="meta", dtype=BF16), torch.empty(5, 16, device="meta", dtype=BF16)
    y, h_last, c_last = ops.strips_lstm(steps, h, h, *octets, begin, None, *octets, begin, None)
    assert y.shape == (3, 5, 16) and h_last.shape == c_last.shape == (5, 16)


@pytest.mark.parametrize(
    ("steps", "width", "hidden", "dtype", "takes"),
    [
        (1, 512, 512, BF16, True),
        (1, 512, 516, BF16, False),  # not a multiple of 8
        (1, 4096, 1024, BF16, False),  # x and h of 16 rows do not fit
        (9, 4096, 1024, BF16, True),  # x goes through the product
        (1, 2048, 512, torch.float32, False),
        (0, 512, 512, BF16, False),
    ],
)
def test_sizes_of_the_lstm_step(steps, width, hidden, dtype, takes):
    assert strips.takes_lstm(steps, width, hidden, dtype) is takes


def test_replaced_and_changed_values_are_packed_anew(packs):
    weight = packed(pathways=("a",))
    index = weight.index()
    first = strips.strips_of(weight, index)
    weight.values = weight.values.clone()  # another tensor of the same version
    second = strips.strips_of(weight, index)
    assert second is not first
    weight.values.data = weight.values.data.clone()  # other memory under the same tensor
    assert strips.strips_of(weight, index) is not second


@pytest.mark.usefixtures("with_kernels")
def test_a_forced_backend_does_not_fall_back(monkeypatch):
    """Pretended: the weight lies on the CPU, the table of backends is asked for a CUDA device."""
    from sparse_pathways.ops import cuda, linear

    weight = packed(pathways=("a",), dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    monkeypatch.setattr(backends, "_forced", "cuda")
    monkeypatch.setattr(backends, "_initialised", True)
    select = backends.select
    monkeypatch.setattr(backends, "select", lambda device, *rest: select("cuda", *rest))
    with pytest.raises(BackendUnavailable, match=r"it has no gradients and no kernels inside torch\.compile"):
        linear._product(x, weight, weight.index(), None)
    with pytest.raises(BackendUnavailable, match="it has no kernels for training"):
        cuda.takes_dense("forward", 8, 64, 40, (8, 1), 0.5, torch.float32)
