"""Rows of one batch through different pathways, against a loop over pathways in float64. Under the interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from sparse_pathways.kernels.pathway_linear import Lists, cut_segments

FUNCTION = "pathway_linear.pathway_linear"
DW = "bcsr_linear_dw.bcsr_linear_dw"

by_cut = pytest.mark.parametrize("cut", ["union", "segments"])
by_storage = pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense_storage"])


class Mixed:
    """A batch of `m` rows over pathways with random, overlapping masks; one pathway keeps nothing, one has no row."""

    def __init__(self, problem, shape, block, dtype, pathways=4, seed=0):
        m, n, k = shape
        self.rng = torch.Generator().manual_seed(seed)
        grid = (-(-n // block[0]), -(-k // block[1]))
        self.masks = torch.rand(pathways, *grid, generator=self.rng) < 0.4
        if pathways > 2:
            self.masks[1] = False
        self.union = problem(shape, block, dtype, mask=self.masks.any(0))
        # NaN behind every row: a read past its last element is not one of the next row, which may be harmless.
        u = self.union
        u.x, u.dy = (F.pad(t, (0, 3), value=torch.nan)[:, : t.shape[1]] for t in (u.x, u.dy))
        rows = torch.randint(0, pathways, (m,), generator=self.rng)
        self.pathway = rows.where(rows != pathways - 1, 0) if pathways > 3 else rows  # unsorted
        entries = self.masks[:, self.union.mask]  # [pathways, union's blocks]
        self.bits = sum(one.to(torch.int32) << p for p, one in enumerate(entries))

    def lists(self, problem, cut, transposed=False):
        """Lists along the outputs, positions into the union's blocks."""
        u = self.union
        names = ("crow_t", "row_t", "pos_t") if transposed else ("crow", "col", None)
        if cut == "union":
            start, index, pos = (None if name is None else getattr(u, name) for name in names)
            return Lists(start, index, pos, self.bits)
        place = torch.full(u.mask.shape, -1, dtype=torch.int32)
        place[u.mask] = torch.arange(int(u.mask.sum()), dtype=torch.int32)
        starts, indices, positions, before = [], [], [], 0
        for mask in self.masks:
            one = problem((1, *u.weight.shape), u.block, mask=mask)
            start, index = getattr(one, names[0]), getattr(one, names[1])
            pos = place[mask]
            starts.append(start + before)
            indices.append(index.int())
            positions.append(pos[one.pos_t.long()] if transposed else pos)
            before += index.shape[0]
        return Lists(torch.stack(starts), torch.cat(indices).to(torch.uint16), torch.cat(positions), None)

    def kept(self, p):
        r, c = self.union.block
        n, k = self.union.weight.shape
        return self.masks[p].repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]

    def by_loop(self, product):
        """(exact, bound) of `product(problem of one pathway)`, rows of each pathway from its own."""
        u, dense = self.union, self.union.dense
        answers = []
        for p in range(len(self.masks)):
            u.dense = dense * self.kept(p)
            answers.append(product(u))
        u.dense = dense
        row = torch.arange(self.pathway.shape[0])
        return type(answers[0])(*(torch.stack(parts)[self.pathway, row] for parts in zip(*answers, strict=True)))

    def dw(self):
        """(exact, bound) of the packed gradient of the weight: each block from the rows whose pathway keeps it."""
        u, (r, c) = self.union, self.union.block
        dy = F.pad(u.dy.double(), (0, -u.dy.shape[1] % r))
        x = F.pad(u.x.double(), (0, -u.x.shape[1] % c))
        mine = self.masks[:, u.mask][self.pathway].double()  # [rows, blocks]: does the row's pathway keep it?
        exact, size = [], []
        for e, (i, j) in enumerate(u.mask.nonzero().tolist()):
            left, right = x[:, j * c :][:, :c].T, dy[:, i * r :][:, :r] * mine[:, e, None]
            exact.append(left @ right)
            size.append(left.abs() @ right.abs())
        return u.answer(torch.stack(exact), torch.stack(size), x.shape[0])


def arguments(mixed, problem, cut, dense, dx=False):
    u = mixed.union
    (n, k), (r, c) = u.weight.shape, u.block
    weight = u.weight if dense else u.values
    strides = u.weight.stride() if dense else (1, r)
    turned = slice(None, None, -1 if dx else 1)
    return {
        "x": u.dy if dx else u.x,
        "weight": weight,
        "lists": mixed.lists(problem, cut, dx),
        "pathway": mixed.pathway,
        "bias": None if dx else u.bias,
        "out": k if dx else n,
        "sides": (r, c)[turned],
        "strides": strides[turned],
    }


@by_cut
@by_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block", "pathways"),
    [
        ((37, 96, 64), (16, 16), 4),
        ((5, 77, 83), (16, 32), 3),
        ((70, 64, 64), (32, 32), 1),
        ((40, 96, 128), (16, 16), 32),
    ],
    ids=str,
)
def test_forward_and_dx_equal_a_loop_over_pathways(interpreted, problem, shape, block, pathways, dense, dtype, cut):
    mixed = Mixed(problem, shape, block, dtype, pathways)
    y = interpreted(FUNCTION, **arguments(mixed, problem, cut, dense))
    mixed.by_loop(lambda case: case.forward()).check(y)
    dx = interpreted(FUNCTION, **arguments(mixed, problem, cut, dense, dx=True))
    mixed.by_loop(lambda case: case.dx()).check(dx)


@pytest.mark.parametrize("splits", [1, 3])
@by_storage
def test_weight_gradient_sums_the_rows_that_use_a_block(interpreted, problem, splits, dense):
    mixed = Mixed(problem, (90, 64, 48), (16, 16), torch.float32)
    u = mixed.union
    given = u.dw_arguments(dense=True) | {"bits": mixed.bits, "pathway": mixed.pathway, "splits": splits}
    dw = interpreted(DW, **given, schedule=None)
    exact, bound = torch.zeros(2, 64, 48, dtype=torch.float64)
    x, dy = u.x.double(), u.dy.double()
    for p in range(len(mixed.masks)):
        mine = mixed.pathway == p
        exact += dy[mine].T @ x[mine] * mixed.kept(p)
        bound += dy[mine].abs().T @ x[mine].abs() * mixed.kept(p)
    assert ((dw.double() - exact).abs() <= bound * 92 * torch.finfo(torch.float32).eps).all()


@by_cut
def test_a_nan_of_another_pathway_stays_there(interpreted, problem, cut):
    """A NaN weight that only pathway 0 keeps, and a NaN in a row of pathway 0: rows of the others stay finite."""
    mixed = Mixed(problem, (20, 64, 64), (16, 16), torch.float32, pathways=3)
    mixed.masks[:, 0, 0] = torch.tensor([True, False, False])
    mixed.masks[2, 1, 1] = True
    again = problem((20, 64, 64), mask=mixed.masks.any(0))
    mixed.union = again
    mixed.bits = sum(one.to(torch.int32) << p for p, one in enumerate(mixed.masks[:, again.mask]))
    again.weight[0, 0] = torch.nan
    again.values[0, 0, 0] = torch.nan
    own = mixed.pathway == 0
    for dense in (False, True):
        y = interpreted(FUNCTION, **arguments(mixed, problem, cut, dense))
        assert y[own, 0].isnan().all()
        assert y[~own].isfinite().all()
        dx = interpreted(FUNCTION, **arguments(mixed, problem, cut, dense, dx=True))
        assert dx[own, 0].isnan().all()
        assert dx[~own].isfinite().all()


@by_cut
def test_far_rows_and_blocks(interpreted, problem, cut):
    """Past element 2**31: rows from 32 on of x and of a dense weight, all blocks of a packed one."""
    mixed = Mixed(problem, (37, 48, 64), (16, 16), torch.float32)
    expected = mixed.by_loop(lambda case: case.forward())
    dense = arguments(mixed, problem, cut, True) | {"strides": (1 << 26, 1)}
    expected.check(interpreted.far(FUNCTION, "x", "weight", **dense))
    packed, before = arguments(mixed, problem, cut, False), 2**31 // 256
    lists = packed["lists"]
    places = torch.arange(mixed.union.col.shape[0], dtype=torch.int32) if lists.pos is None else lists.pos
    bits = None if lists.bits is None else torch.cat([torch.zeros(before, dtype=torch.int32), lists.bits])
    packed["lists"] = lists._replace(pos=places + before, bits=bits)
    expected.check(interpreted.far(FUNCTION, **packed, pool="weight"))


@by_cut
def test_no_rows(interpreted, problem, cut):
    mixed = Mixed(problem, (0, 32, 32), (16, 16), torch.float32)
    assert interpreted(FUNCTION, **arguments(mixed, problem, cut, False)).shape == (0, 32)


@pytest.mark.parametrize("seed", range(6))
def test_segments_cover_every_row_once(seed):
    rng = torch.Generator().manual_seed(seed)
    pathways, m, tile_m = 1 + seed, int(torch.randint(0, 90, (1,), generator=rng)), 16
    pathway = torch.randint(0, pathways, (m,), generator=rng)
    order, tiles = cut_segments(pathway, pathways, tile_m)
    seen = []
    for p, first, last in tiles.tolist():
        assert last - first <= tile_m
        rows = order[first:last].tolist() if last > first else []
        assert all(pathway[row] == p for row in rows)
        seen += rows
    assert sorted(seen) == list(range(m))
