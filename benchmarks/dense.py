"""Dense contenders: what a user could run instead, without sparsity. The best of them is the one to beat.

"F.linear" is what nn.Linear calls. "oneDNN" and "MKL" hold weights packed beforehand; MKL packs for one number of rows
and float32 only. "frozen" is torch.compile with freezing, which lowers a linear layer to one of these two: measured
where it is asked for, because it compiles for seconds per shape. int8: torch's dynamically quantised product of each
engine, weights with one scale per output.
"""

import re
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Torch means to drop its quantised tensors; today its int8 products are made of them.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")

Product = Callable[[Tensor], Tensor]  # x [M, K] -> [M, N]


def f_linear(weight: Tensor, bias: Tensor, rows: int) -> Product:
    return lambda x: F.linear(x, weight, bias)


def onednn(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    packed, product = torch.ops.mkldnn._reorder_linear_weight(weight, rows), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


def mkl(weight: Tensor, bias: Tensor, rows: int) -> Product:
    packed, product = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), torch.ops.mkl._mkl_linear.default
    return lambda x: product(x, packed, weight, bias, rows)


def _quantised(engine: str) -> Callable[[Tensor, Tensor, int], Product]:
    def make(weight: Tensor, bias: Tensor, rows: int) -> Product:
        scales = (weight.abs().amax(1) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        torch.backends.quantized.engine = engine
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, bias)
        product = torch.ops.quantized.linear_dynamic.default
        return lambda x: product(x, packed)

    return make


def available(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, int], Product]]:
    """The dense products of a dtype that this build of torch has, by name; each takes (weight, bias, rows)."""
    if dtype == torch.int8:
        engines = torch.backends.quantized.supported_engines
        return {f"torch int8 {name}": _quantised(name) for name in ("fbgemm", "x86", "onednn") if name in engines}
    products = {"F.linear": f_linear}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = onednn
    if torch._C.has_mkl and dtype == torch.float32:
        products["MKL"] = mkl
    return products


class Frozen:
    """All copies of a layer in one compiled graph with frozen weights; the cost of entering it is shared by them."""

    def __init__(self, weight: Tensor, bias: Tensor, copies: int, x: Tensor) -> None:
        from torch._inductor import config
        from torch._inductor.utils import run_and_get_code

        layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0], device="meta") for _ in range(copies))
        for layer in layers:
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)
        self.copies = copies
        self.inputs = [x.clone() for _ in range(copies)]  # equal inputs could be fused into one wide product
        self._graph = torch.compile(_Each(layers).eval(), dynamic=False)
        torch._dynamo.reset()
        with config.patch(freezing=True):
            _, code = run_and_get_code(self._graph, self.inputs)
        found = set(re.findall(r"(?:torch\.ops\.|extern_kernels\.)((?:mkl|mkldnn)\._\w*linear\w*|addmm|mm)\b", code[0]))
        self.lowered_to = ", ".join(sorted(found)) or "generated code"

    def __call__(self) -> list[Tensor]:
        return self._graph(self.inputs)


class _Each(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


class PrepackedLinear(nn.Module):
    """nn.Linear for inference with oneDNN's packed weight; its time does not depend on the rows it was packed for."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.product = onednn(linear.weight.detach(), bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def prepack_(model: nn.Module, rows: int) -> nn.Module:
    """Swap every nn.Linear of a model for a PrepackedLinear, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PrepackedLinear(child, rows))
    return model
