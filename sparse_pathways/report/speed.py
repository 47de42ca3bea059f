"""Speed of packed layers against the fastest dense product of the same shape."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_pathways as sp
from sparse_pathways.report.results import Speed


class PrepackedLinear(nn.Module):
    """Dense linear layer with its weight in oneDNN's own order: what freezing a compiled model gives.

    Args:
        linear: fp32 layer on the CPU; copied.
        rows: number of rows the order is chosen for; others work too.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` -> `[..., N]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def can_prepack() -> bool:
    """Whether this torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def prepack_(model: nn.Module, rows: int, names: Iterable[str]) -> nn.Module:
    """Swap the nn.Linear layers called `names` for PrepackedLinear, in place."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PrepackedLinear(model.get_submodule(name), rows))  # type: ignore[arg-type]
    return model


def layer_speed(model: nn.Module, rows: Sequence[int], *, rounds: int = 15, target_s: float = 1e-3) -> list[Speed]:
    """Time every packed layer of a model, its active pathway, against the dense products it replaces.

    The contenders take turns `rounds` times, each turn lasting about `target_s`; the median turn counts. A packed
    result that differs from the dense one by more than rounding is an error: a wrong product has no speed.

    Args:
        model: with PackedLinear layers in fp32 on the CPU.
        rows: numbers of rows M to time.
        rounds: turns.
        target_s: seconds per turn.

    Raises:
        ValueError: the model has no packed layers.
        ArithmeticError: a packed product is wrong.
    """
    layers = {name: layer for name, layer in sp.sparse_layers(model).items() if isinstance(layer, sp.PackedLinear)}
    if not layers:
        raise ValueError("the model has no packed layers; pack it first")
    return [_layer(name, layer, count, rounds, target_s) for name, layer in layers.items() for count in rows]


@torch.inference_mode()
def _layer(name: str, layer: sp.PackedLinear, rows: int, rounds: int, target_s: float) -> Speed:
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    dense.weight.copy_(layer.packed.unpack(layer.active))
    if layer.bias is not None:
        dense.bias.copy_(torch.as_tensor(layer.bias))
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: F.linear(x, dense.weight, dense.bias),
        "packed": lambda: layer(x),
    }
    if can_prepack():
        prepacked = PrepackedLinear(dense, rows)
        contenders["prepacked"] = lambda: prepacked(x)
    _check(name, contenders["packed"](), x, dense)
    times = _interleave(contenders, rounds, target_s)
    return Speed(
        layer=name,
        outputs=layer.out_features,
        inputs=layer.in_features,
        density=layer.packed.density(layer.active),
        rows=rows,
        linear_us=times["linear"],
        prepacked_us=times.get("prepacked"),
        packed_us=times["packed"],
        backend=sp.explain(layer, rows).split(": ", 1)[-1],
    )


def _check(name: str, result: Tensor, x: Tensor, dense: nn.Linear) -> None:
    """Compare with float64; the bound is that of an fp32 sum of K products, element by element."""
    bias = 0.0 if dense.bias is None else dense.bias.double()
    exact = x.double() @ dense.weight.double().T + bias
    magnitude = x.double().abs() @ dense.weight.double().abs().T + torch.as_tensor(bias).abs()
    bound = magnitude * (x.shape[1] + 2) * torch.finfo(torch.float32).eps
    if not bool(((result.double() - exact).abs() <= bound).all()):
        raise ArithmeticError(f"layer {name}: the packed product differs from the dense one by more than rounding")


def _interleave(contenders: dict[str, Callable[[], Tensor]], rounds: int, target_s: float) -> dict[str, float]:
    """Median microseconds per call of each contender."""
    calls = {}
    for name, run in contenders.items():
        run()
        begin = time.perf_counter()
        for _ in range(3):
            run()
        calls[name] = max(1, round(target_s / ((time.perf_counter() - begin) / 3)))
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            turns[name].append((time.perf_counter() - begin) / calls[name] * 1e6)
    return {name: statistics.median(values) for name, values in turns.items()}


def best_dense_us(speed: Speed) -> float:
    """Microseconds of the faster dense product."""
    return min(speed["linear_us"], speed["prepacked_us"] or float("inf"))
