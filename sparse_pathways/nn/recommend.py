"""Whether sparsity pays on this machine, layer by layer: predicted from a short calibration, not measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparse_pathways.checks import Block
from sparse_pathways.layout.packed import DTYPES
from sparse_pathways.nn.calibrate import dense_kernels, dense_model, sparse_model
from sparse_pathways.nn.linear import PackedLinear, SparseLinear
from sparse_pathways.ops import backends

BLOCK = (8, 1)  # assumed of layers that are dense so far: the default of sparsify_


@dataclass(frozen=True)
class Recommendation:
    """What one layer is predicted to cost per call, dense and packed.

    Attributes:
        layer: name.
        shape: (N, K).
        block: (R, C); of a dense layer the one that `sparsify_` would give it.
        dtype: of the packed values.
        rows: M.
        density: kept share of the active pathway, in [0, 1]; 1.0 for a dense layer.
        dense_us: predicted microseconds of the fastest dense product.
        dense_kernel: its name.
        sparse_us: predicted microseconds of the packed product at this density.
        sparse_kernel: backend that serves it; see `explain`.
        break_even_sparsity: share of pruned blocks, all layers alike, from which the packed product is predicted to be
            faster; None: never.
    """

    layer: str
    shape: tuple[int, int]
    block: Block
    dtype: torch.dtype
    rows: int
    density: float
    dense_us: float
    dense_kernel: str
    sparse_us: float
    sparse_kernel: str
    break_even_sparsity: float | None

    @property
    def speedup(self) -> float:
        """Predicted dense time over predicted packed time; above 1 the packed product is faster."""
        return self.dense_us / self.sparse_us

    @property
    def pays(self) -> bool:
        """Whether the packed product is predicted to be faster at this density."""
        return self.speedup > 1

    def __str__(self) -> str:
        return str(Recommendations([self]))


class Recommendations(list[Recommendation]):
    """Rows of `recommend`, in the order of the model; the text is a table."""

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.layer) for row in self)])
        lines = [
            f"{'layer':{width}}  {'N x K':>11} {'M':>4} {'density':>7}  {'dense':10} {'us':>8}  {'packed':10} "
            f"{'us':>8} {'speed-up':>8}  pays (predicted)"
        ]
        for row in self:
            share = row.break_even_sparsity
            when = "at no sparsity" if share is None else f"from {share:.0%} sparsity on"
            lines.append(
                f"{row.layer:{width}}  {f'{row.shape[0]} x {row.shape[1]}':>11} {row.rows:4} {row.density:7.0%}  "
                f"{row.dense_kernel:10} {row.dense_us:8.1f}  {row.sparse_kernel:10} {row.sparse_us:8.1f} "
                f"{row.speedup:7.2f}x  {'yes' if row.pays else 'no'}, {when}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Layer:
    name: str
    shape: tuple[int, int]
    block: Block
    dtype: torch.dtype
    density: float
    shared: bool

    def weights(self, density: float) -> float:
        """Stored weights of the kept blocks."""
        blocks = -(-self.shape[0] // self.block[0]) * -(-self.shape[1] // self.block[1])
        return density * blocks * self.block[0] * self.block[1]

    def bytes(self, density: float) -> float:
        """What a packed product reads: values and a 16-bit id per block, and positions if pathways share values."""
        per_block = self.block[0] * self.block[1] * self.dtype.itemsize + (6 if self.shared else 2)
        return self.weights(density) / (self.block[0] * self.block[1]) * per_block

    def dense_bytes(self) -> int:
        """What the fastest dense product of the dtype reads."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def _layers(model: nn.Module, dtype: torch.dtype | None) -> list[_Layer]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            packed = module.packed
            device, block, own, pathways = packed.device, packed.block, packed.dtype, packed.pathways
            shape, density = packed.shape, packed.density(module.active)
        elif isinstance(module, SparseLinear):
            device, block, own, pathways = module.weight.device, module.block, module.weight.dtype, module.pathways
            shape, density = (module.out_features, module.in_features), module.layout().density
        elif type(module) is nn.Linear:
            device, block, own, pathways = module.weight.device, BLOCK, module.weight.dtype, ()
            shape, density = (module.out_features, module.in_features), 1.0
        else:
            continue
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"layer {name} is on {device}; recommend calibrates CPU products: move it there")
        if min(shape) > 0:
            found.append(_Layer(name, shape, block, dtype or own, density, len(pathways) > 1))
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no linear layers, so there is nothing to recommend")
    return found


@torch.inference_mode()
def recommend(model: nn.Module, rows: int, dtype: torch.dtype | None = None) -> Recommendations:
    """Predict for every linear layer whether its packed product beats the best dense one on this CPU, and by how much.

    The first call with a new dtype, block, number of rows or of threads measures a handful of small products (about a
    second); further calls compute. The layers are taken to run one after the other, so that what does not fit in a
    cache with all the others comes from farther away. SparseLinear is predicted as it would be packed. Recurrent layers
    and convolutions are left out, and so is what Python does around a product.

    Args:
        model: nn.Linear, SparseLinear or PackedLinear layers, on the CPU (or meta: only shapes are read).
        rows: M of one call: frames in a chunk times streams, or beam width.
        dtype: of the packed values: float32, float64, bfloat16, float16 or int8; default each layer's own.

    Returns:
        A list of `Recommendation`; printed, a table.

    Raises:
        TypeError, ValueError: no linear layers, rows < 1, unknown dtype, a layer on another device.
        BackendUnavailable: a forced backend cannot serve a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; want an nn.Module")
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"rows = {rows!r}; want an int")
    if rows < 1:
        raise ValueError(f"rows = {rows}; want at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype = {dtype}; choose one of {', '.join(map(str, DTYPES))}")
    layers = _layers(model, dtype)
    with torch.autocast("cpu", enabled=False):
        return Recommendations([_one(layer, layers, rows) for layer in layers])


def _one(layer: _Layer, layers: list[_Layer], rows: int) -> Recommendation:
    threads, (n, k) = torch.get_num_threads(), layer.shape
    backend = backends.select("cpu", layer.dtype, layer.block)
    sparse = sparse_model(layer.dtype, layer.block, rows, layer.shared, backend, threads)
    dense_set = sum(one.dense_bytes() for one in layers)
    dense = {
        name: dense_model(layer.dtype, rows, name, threads).us(n * k, k, n, dense_set)
        for name in dense_kernels(layer.dtype)
    }
    best = min(dense, key=dense.__getitem__)

    def sparse_us(density: float | None) -> float:  # of all layers alike, or of each its own
        total = sum(one.bytes(one.density if density is None else density) for one in layers)
        used = 1.0 if backend == "reference" else layer.density if density is None else density
        return sparse.us(layer.weights(used), k, n, total)

    pays = (percent / 100 for percent in range(101) if sparse_us(1 - percent / 100) < dense[best])
    return Recommendation(
        layer=layer.name,
        shape=layer.shape,
        block=layer.block,
        dtype=layer.dtype,
        rows=rows,
        density=layer.density,
        dense_us=dense[best],
        dense_kernel=best,
        sparse_us=sparse_us(None),
        sparse_kernel=backend,
        break_even_sparsity=next(pays, None),
    )
