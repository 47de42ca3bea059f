"""One linear layer with bias, 8x1 blocks: `sp.sparse_linear` against the best dense product of the same dtype."""

import collections
import copy
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparse_pathways as sp
from benchmarks import ceilings, dense, duel, workload
from benchmarks.workload import BLOCK, DTYPES, Shape

SIZES = (512, 1024, 2048)
LEVELS = {"l2": "beyond L2", "l3": "beyond L3"}
STREAMS = {"L2": workload.cache_bytes(2) // 2} | {
    name: workload.rotation_bytes(level) for name, level in (("L3", "l2"), ("memory", "l3"))
}  # what is read in order to measure the bandwidth of each
HOME = {"l2": "L3", "l3": "memory"}  # where the weights of a table come from
FROZEN_COPIES = 16  # more would compile for minutes; freezing lowers to products that are measured anyway
MODULE_ROWS = 8  # up to here a call is so short that the way in shows


@dataclass(frozen=True)
class Plan:
    """Which cells, and how long each may take."""

    shapes: tuple[Shape, ...] = tuple(itertools.product(SIZES, SIZES))
    rows: tuple[int, ...] = (1, 2, 4, 5, 8, 16, 32, 64, 512)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    sparsities: tuple[float, ...] = (0.7, 0.9, 0.95)
    seconds: float = 1.0
    turns: int | None = None
    frozen_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by level


class Group:
    """The weights of one shape and dtype in every form, rotating; rows come and go."""

    def __init__(self, shape: Shape, dtype: str, level: str, plan: Plan) -> None:
        self.shape, self.dtype, self.level, self.plan = shape, dtype, level, plan
        weight, bias = workload.weight_and_bias(shape)
        self.x_dtype = torch.float32 if dtype == "int8" else DTYPES[dtype]
        self.weight, self.bias = weight.to(self.x_dtype), bias.to(self.x_dtype)
        itemsize = DTYPES[dtype].itemsize
        self.dense_copies = workload.copies(weight.numel() * itemsize, level)
        self._prepacked: dict[str, list[dense.Product]] = {}
        self.packed: dict[float, list[sp.PackedWeight]] = {}
        self.read_bytes: dict[float, int] = {}
        for sparsity in plan.sparsities:
            mask = workload.block_mask(shape, sparsity)
            one = sp.PackedWeight.pack(self.weight, mask, BLOCK, DTYPES[dtype])
            tensors = [one.values, one.scale, *one.index()]
            self.read_bytes[sparsity] = sum(t.nbytes for t in tensors if t is not None) + self.bias.nbytes
            more = workload.copies(one.values.nbytes, level) - 1
            self.packed[sparsity] = [one, *(copy.deepcopy(one) for _ in range(more))]

    def cell(self, m: int) -> tuple[list[dict[str, Any]], list[str]]:
        """One row per sparsity, and what was left out because its product was wrong or could not run."""
        shape, plan = self.shape, self.plan
        x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).to(self.x_dtype)
        contenders, faults = [], []
        for contender, answer, check in self._contenders(x):
            try:
                check(answer)
                contenders.append(contender)
            except (ArithmeticError, RuntimeError, NotImplementedError) as error:
                faults.append(f"{self.title} M={m} {contender.name}: {error}")
        dense_names = [one.name for one in contenders if one.dense]
        if not dense_names:
            return [], faults
        times = duel.duel(contenders, plan.seconds, plan.turns)
        verdicts = {one.name: one for one in duel.judge(times, dense_names)}
        dense_us = {name: statistics.median(times[name]) * 1e6 for name in dense_names}
        rows = []
        for sparsity in plan.sparsities:
            if (verdict := verdicts.get(_name(sparsity))) is not None:
                module = verdicts.get(_module_name(sparsity))
                rows.append(self._row(m, x, sparsity, verdict, module, dense_us))
        return rows, faults

    @property
    def title(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} {self.dtype}"

    def _contenders(self, x: Tensor) -> Iterator[tuple[duel.Contender, Any, Any]]:
        """Contender, the exact answer it must meet, and the function that makes it prove itself."""
        m, dtype = x.shape[0], DTYPES[self.dtype]
        exact = workload.answer(x, self.weight, None, self.bias, dtype)

        def proof(name: str, products: list[Any]) -> Any:
            def prove(answer: workload.Answer) -> None:
                outputs = collections.deque((product(x) for product in products), maxlen=1)  # a first call may set up
                answer.check(name, products[0](x))
                answer.check(name, outputs[0])

            return prove

        for name in dense.available(dtype):
            products = self._dense(name, m)
            run = duel.rotating(products, x)
            yield duel.Contender(name, True, run, rotation=len(products)), exact, proof(name, products)
        if m in self.plan.frozen_rows.get(self.level, ()) and dtype != torch.int8:
            if self.dense_copies <= FROZEN_COPIES:
                frozen = dense.Frozen(self.weight, self.bias, self.dense_copies, x)
                name = f"frozen ({frozen.lowered_to})"

                def prove(answer: workload.Answer) -> None:
                    for y in frozen():
                        answer.check(name, y)

                yield duel.Contender(name, True, frozen, products=frozen.copies), exact, prove
        for sparsity, weights in self.packed.items():
            kept = sp.expand_mask(workload.block_mask(self.shape, sparsity), BLOCK, self.shape)
            exact = workload.answer(x, self.weight, kept, self.bias, dtype)
            forms = {_name(sparsity): [_functional(packed, self.bias) for packed in weights]}
            if m <= MODULE_ROWS:
                forms[_module_name(sparsity)] = [sp.PackedLinear(packed, self.bias).eval() for packed in weights]
            for name, products in forms.items():
                run = duel.rotating(products, x)
                yield duel.Contender(name, False, run, rotation=len(products)), exact, proof(name, products)

    def _dense(self, name: str, m: int) -> list[dense.Product]:
        """Copies of a dense product; only MKL's depend on the rows."""
        if name not in self._prepacked or name == "MKL":
            make = dense.available(DTYPES[self.dtype])[name]
            source = (lambda: self.weight.clone()) if name == "F.linear" else (lambda: self.weight)
            self._prepacked[name] = [make(source(), self.bias, m) for _ in range(self.dense_copies)]
        return self._prepacked[name]

    def _row(
        self,
        m: int,
        x: Tensor,
        sparsity: float,
        verdict: duel.Verdict,
        module: duel.Verdict | None,
        dense_us: dict[str, float],
    ) -> dict[str, Any]:
        n, k = self.shape
        seconds = verdict.fastest_sparse_us * 1e-6  # for the shares of the ceilings, which are the fastest of many, too
        operations = 2 * m * self.packed[sparsity][0].values.numel()
        nbytes = self.read_bytes[sparsity] + x.nbytes + m * n * x.element_size()
        return {
            "n": n,
            "k": k,
            "m": m,
            "dtype": self.dtype,
            "sparsity": sparsity,
            "best_dense": verdict.best_dense,
            "dense_us": verdict.dense_us,
            "sparse_us": verdict.sparse_us,
            "fastest_sparse_us": verdict.fastest_sparse_us,
            "module_us": module.sparse_us if module is not None else None,
            "ratio": verdict.ratio,
            "quartiles": verdict.quartiles,
            "ratio_of_fastest": verdict.ratio_of_fastest,
            "gflops": operations / seconds / 1e9,
            "gbytes": nbytes / seconds / 1e9,
            "intensity": operations / nbytes,
            "dense": dense_us,
        }


def _functional(packed: sp.PackedWeight, bias: Tensor) -> Any:
    return lambda x: sp.sparse_linear(x, packed, bias)


def _name(sparsity: float) -> str:
    return f"sparse {sparsity:.0%}"


def _module_name(sparsity: float) -> str:
    return f"module {sparsity:.0%}"


def run(level: str, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """All cells of a table, printed as they are done: (ceilings and terms, rows, faults)."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    samples: list[dict[str, float | None]] = []
    for shape in plan.shapes:
        for dtype in plan.dtypes:
            samples.append({dtype: ceilings.peak(dtype)} | {name: ceilings.bandwidth(n) for name, n in STREAMS.items()})
            group = Group(shape, dtype, level, plan)
            for m in plan.rows:
                measured, failed = group.cell(m)
                rows += measured
                faults += failed
                print(line(shape, dtype, m, measured), flush=True)
    limits = ceilings.summary(samples)
    add_shares(rows, limits, level)
    print("\n" + ceilings.sentence(limits))
    what = {
        "call": "one Python call with bias, block 8x1, one thread, inference_mode",
        "level": level,
        "home": HOME[level],
        "weights": f"rotating over {workload.rotation_bytes(level) / 2**20:.0f} MB, {LEVELS[level]}",
        "frozen": "torch.compile with freezing is measured at M in "
        f"{list(plan.frozen_rows.get(level, ()))}, for up to {FROZEN_COPIES} copies in one graph",
        "ceilings": limits,
        "faults": faults,
    }
    return what, rows, faults


def add_shares(rows: list[dict[str, Any]], limits: dict[str, Any], level: str) -> None:
    """Put each row beside the ceilings of its run."""
    for row in rows:
        peak, stream = limits[row["dtype"]], limits[HOME[level]]
        row["peak_share"] = None if peak is None else row["gflops"] / peak["median"]
        row["bandwidth_share"] = row["gbytes"] / stream["median"]


def line(shape: Shape, dtype: str, m: int, rows: list[dict[str, Any]]) -> str:
    """One cell for the terminal."""
    text = f"{shape[0]:4}x{shape[1]:<4} {dtype:8} M={m:<3}"
    if not rows:
        return f"{text} nothing to compare"
    text += f" {rows[0]['best_dense'][:28]:18} {rows[0]['dense_us']:8.1f} us"
    for row in rows:
        low, high = row["quartiles"]
        mark = "" if row["ratio"] >= 1 else " SLOWER"
        text += (
            f" | {row['sparsity']:.0%} {row['sparse_us']:7.1f} us {row['ratio']:5.2f}x ({low:.2f}-{high:.2f}) "
            f"{row['gflops']:4.0f} GF {row['gbytes']:3.0f} GB/s{mark}"
        )
    return text
