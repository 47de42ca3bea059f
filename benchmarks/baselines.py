"""Dense contenders: what a user could run instead, without sparsity. The best of them is the one to beat.

"F.linear" is what nn.Linear calls. "oneDNN" and "MKL" hold weights packed beforehand, as Inductor's freezing does; MKL
packs for one number of rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]  # x [M, K] -> [M, N]


def f_linear(weight: Tensor, bias: Tensor, rows: int) -> Product:
    return lambda x: F.linear(x, weight, bias)


def onednn(weight: Tensor, bias: Tensor, rows: int) -> Product:
    packed, product = torch.ops.mkldnn._reorder_linear_weight(weight, rows), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


def mkl(weight: Tensor, bias: Tensor, rows: int) -> Product:
    packed, product = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), torch.ops.mkl._mkl_linear.default
    return lambda x: product(x, packed, weight, bias, rows)


def available() -> dict[str, Callable[[Tensor, Tensor, int], Product]]:
    """The dense products that this build of torch has, by name."""
    products = {"F.linear": f_linear}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = onednn
    if torch._C.has_mkl:
        products["MKL"] = mkl
    return products


class PrepackedLinear(nn.Module):
    """nn.Linear for inference with oneDNN's packed weight; its time does not depend on the rows it was packed for."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.product = onednn(linear.weight.detach(), linear.bias.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def prepack_(model: nn.Module, rows: int) -> nn.Module:
    """Swap every nn.Linear of a model for a PrepackedLinear, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PrepackedLinear(child, rows))
    return model
