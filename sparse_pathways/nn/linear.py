"""SparseLinear (training: dense weight, one block mask per pathway) and PackedLinear (inference: kept blocks only)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sparse_pathways.checks import Block, check_block, check_mask, check_names, grid, unknown_pathway
from sparse_pathways.layout import BlockLayout, PackedWeight
from sparse_pathways.mask import expand_blocks, pack_bits, unpack_bits
from sparse_pathways.ops import masked_linear, sparse_linear


class SparseLinear(nn.Linear):
    """`nn.Linear` with block masks: one dense `weight`, one mask per pathway, one pathway active at a time.

    Keys are those of nn.Linear plus the buffers `block_mask` (uint8 `[pathways, ceil(NB * KB / 8)]`, one bit per block,
    in the order of `pathways`) and `mask_layout` (block and pathways as JSON, uint8), by which masks of other blocks or
    pathways are refused. A dense checkpoint loads (masks stay as they are) and `to_linear` goes back. Writes into the
    buffer by others (EMA, DDP) are seen at the next forward; a compiled model sees them after a call of `layout()`. An
    average over masks means nothing: give EMA `use_buffers=False`.

    Attributes:
        weight: Parameter `[out_features, in_features]`, dense; pruned values are kept and never read.
        bias: Parameter `[out_features]` or None.
        block: (R, C).
        pathways: names.
        active: name of the pathway that `forward` uses.
        dense_grad: True: pruned weights receive a straight-through gradient; see `masked_linear`.
        gates: None, or what a `Pruner` has set while it learns masks: called with the active pathway and whether the
            layer trains, it gives what to multiply the blocks with, `[NB, KB]`, or None. Not saved, and left behind
            by copies.
    """

    block_mask: Tensor
    mask_layout: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]
    gates: Callable[[str, bool], Tensor | None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: Block = (8, 1),
        pathways: Iterable[str] = ("default",),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Like nn.Linear; every mask starts with all blocks kept."""
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(check_block(block), check_names(pathways))

    def _set_up(self, block: Block, names: tuple[str, ...]) -> None:
        self.block, self.pathways, self.active, self.dense_grad = block, names, names[0], True
        self._grid = grid((self.out_features, self.in_features), block)
        full = torch.ones(len(names), self._grid[0] * self._grid[1], dtype=torch.bool, device=self.weight.device)
        self.register_buffer("block_mask", pack_bits(full))
        self._describe_masks()
        self._build_layouts()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Tensor | None = None,
        block: Block = (8, 1),
        pathways: Iterable[str] = ("default",),
    ) -> SparseLinear:
        """Take over the parameters of `linear` (the same tensors, not copies).

        Args:
            linear: the dense layer.
            mask: bool `[NB, KB]` for all pathways; None keeps every block.
            block: (R, C).
            pathways: names.
        """
        sparse = cls.__new__(cls)
        nn.Module.__init__(sparse)
        sparse.in_features, sparse.out_features = linear.in_features, linear.out_features
        sparse.weight, sparse.bias, sparse.training = linear.weight, linear.bias, linear.training
        sparse._set_up(check_block(block), check_names(pathways))
        if mask is not None:
            sparse.set_mask_(mask)
        return sparse

    def to_linear(self, pathway: str | None = None) -> nn.Linear:
        """A plain nn.Linear with the weights of one pathway (the active one by default), zero where pruned."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.pack(pathways=(pathway or self.active,)).unpack())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _index(self, pathway: str) -> int:
        if pathway not in self.pathways:
            raise unknown_pathway(pathway, self.pathways)
        return self.pathways.index(pathway)

    def mask(self, pathway: str | None = None) -> Tensor:
        """Bool block mask `[NB, KB]` of one pathway (the active one by default)."""
        bits = self.block_mask[self._index(pathway or self.active)]
        return unpack_bits(bits, self._grid[0] * self._grid[1]).view(self._grid)

    @property
    def masks(self) -> dict[str, Tensor]:
        """{pathway: bool `[NB, KB]`}; fresh tensors, change masks by `set_mask_`."""
        return {name: self.mask(name) for name in self.pathways}

    def set_mask_(self, mask: Tensor, pathway: str | None = None) -> SparseLinear:
        """Change the mask of one pathway, or of all of them (None), and re-pack its index lists.

        Args:
            mask: bool `[NB, KB]`; copied.
            pathway: name.
        """
        check_mask(mask, self.block, (self.out_features, self.in_features))
        rows = range(len(self.pathways)) if pathway is None else (self._index(pathway),)
        # Index lists made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            mask = mask.to(self.block_mask.device)
            layout = self._layouts[rows[0]].updated(mask)
            if self.block_mask.is_inference():
                self.block_mask = self.block_mask.clone()
            for row in rows:
                self.block_mask[row] = layout.bits
                self._layouts[row] = layout
            self._remember()
        return self

    def add_pathway_(self, name: str, like: str | None = None) -> SparseLinear:
        """Add a pathway; the others, and the weight, stay as they are.

        Args:
            name: not yet a pathway.
            like: pathway whose mask it starts with; None: all blocks kept.
        """
        names = check_names((*self.pathways, name))
        if like is None:
            bits = pack_bits(torch.ones(self._grid[0] * self._grid[1], dtype=torch.bool, device=self.block_mask.device))
        else:
            bits = self.block_mask[self._index(like)]
        self.block_mask = torch.cat([self.block_mask, bits[None]])
        self.pathways = names
        self._describe_masks()
        self._build_layouts()
        return self

    def _describe_masks(self) -> None:
        text = json.dumps({"block": self.block, "pathways": self.pathways}).encode()
        described = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.register_buffer("mask_layout", described.to(self.block_mask.device))

    def _build_layouts(self) -> None:
        shape = (self.out_features, self.in_features)
        built: dict[bytes, BlockLayout] = {}
        self._layouts = []
        with torch.inference_mode(False), torch.no_grad():
            for name, bits in zip(self.pathways, self.block_mask, strict=True):
                key = b"meta" if bits.is_meta else bits.cpu().numpy().tobytes()
                if key not in built:
                    full = torch.ones(self._grid, dtype=torch.bool, device="cpu")
                    built[key] = BlockLayout.from_mask(full if bits.is_meta else self.mask(name), self.block, shape)
                self._layouts.append(built[key])
            self._remember()

    def _remember(self) -> None:
        """The buffer that the layouts were built from: the tensor, its count of in-place writes, and its bits."""
        bits = self.block_mask
        self._built_from = bits, None if bits.is_inference() else bits._version, bits.clone()

    def _in_step(self) -> bool:
        buffer, version, bits = self._built_from
        if self.block_mask is buffer and version is not None and version == self.block_mask._version:
            return True
        same = bits.device == self.block_mask.device and torch.equal(bits, self.block_mask)
        if same:
            self._remember()
        return same

    def __getstate__(self):  # type: ignore[no-untyped-def]
        # A copy would bring a copy of the Pruner and its optimiser along.
        return {name: value for name, value in self.__dict__.items() if name != "gates"}

    def __setstate__(self, state):  # type: ignore[no-untyped-def]
        super().__setstate__(state)
        buffer, _, bits = self._built_from
        self._built_from = buffer, None, bits  # a copied tensor counts its writes anew

    def layout(self, pathway: str | None = None) -> BlockLayout:
        """Index lists of one pathway (the active one by default), in step with its mask."""
        # The buffer can change behind our back: EMA copies into it, DDP broadcasts it before every forward.
        if not torch.compiler.is_compiling() and not self._in_step():
            self._build_layouts()
        return self._layouts[self._index(pathway or self.active)]

    def pack(
        self, dtype: torch.dtype | None = None, pathways: Iterable[str] | None = None, quantise_x: bool = True
    ) -> PackedWeight:
        """The kept blocks of these pathways (all by default), packed; arguments as for `PackedWeight.pack`."""
        names = self.pathways if pathways is None else check_names(pathways)
        return PackedWeight.pack(self.weight, {name: self.mask(name) for name in names}, self.block, dtype, quantise_x)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` -> `[..., out_features]` with the active pathway's mask."""
        return masked_linear(x, self.gated_weight(), self.layout(), self.bias, dense_grad=self.dense_grad)

    def gated_weight(self) -> Tensor:
        """The weight that a product sees: times `gates`, where there are any."""
        gate = None if self.gates is None else self.gates(self.active, self.training)
        if gate is None:
            return self.weight
        return self.weight * expand_blocks(
            gate.to(self.weight.dtype), self.block, (self.out_features, self.in_features)
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self._build_layouts()
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        state_dict = dict(state_dict)
        given = any(prefix + key in state_dict for key in ("mask_layout", "block_mask", "weight"))
        refusal = self._refuse_layout(state_dict.pop(prefix + "mask_layout", None))
        self._describe_masks()  # on the device of the masks, also after to_empty
        if given:  # else it is missing, and said so
            state_dict[prefix + "mask_layout"] = self.mask_layout
        if refusal is not None:
            errors.append(f"{prefix.rstrip('.') or type(self).__name__}: {refusal}")
            state_dict[prefix + "block_mask"] = self.block_mask
        elif prefix + "block_mask" not in state_dict and prefix + "weight" in state_dict:
            warnings.warn(
                "a dense checkpoint is loaded into a sparse model: weights are replaced, masks stay as they are",
                stacklevel=2,
            )
            bits = self.block_mask
            if bits.is_meta:
                bits = pack_bits(torch.ones(len(self.pathways), self._grid[0] * self._grid[1], dtype=torch.bool))
            state_dict[prefix + "block_mask"] = bits
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._build_layouts()

    def _refuse_layout(self, saved: Tensor | None) -> str | None:
        """Why masks with this `mask_layout` are not masks of this layer; None where they are, or nothing is said."""
        if saved is None or saved.is_meta:
            return None
        try:
            found = json.loads(bytes(saved.to(torch.uint8).tolist()))  # also of a state cast or averaged as a whole
            block, names = tuple(found["block"]), tuple(found["pathways"])
        except (ValueError, TypeError, KeyError) as error:
            return f"mask_layout cannot be read ({error})"
        if block != self.block:
            return f"the masks loaded are of blocks {block}, those of this layer of {self.block}"
        if names != self.pathways:
            return f"the masks loaded are of the pathways {', '.join(names)}; this layer has {', '.join(self.pathways)}"
        return None

    def extra_repr(self) -> str:
        """Sizes, block, and the density of each pathway."""
        shares = ", ".join(
            f"{name}={layout.density:.3f}" for name, layout in zip(self.pathways, self._layouts, strict=True)
        )
        return f"{super().extra_repr()}, block={self.block}, density: {shares}"


class PackedLinear(nn.Module):
    """Inference form of a linear layer: packed blocks of all its pathways, one of them active.

    Attributes:
        packed: PackedWeight.
        bias: tensor `[out_features]` or None; not trainable.
        active: name of the pathway that `forward` uses.
    """

    packed: PackedWeight
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, active: str | None = None) -> None:
        """Hold `packed` and `bias`; `active` defaults to the first pathway."""
        super().__init__()
        self.packed = packed
        self.register_buffer("bias", None if bias is None else bias.detach().to(packed.x_dtype))
        self.active = active or packed.pathways[0]
        packed.index(self.active)

    @property
    def pathways(self) -> tuple[str, ...]:
        """Names of the pathways."""
        return self.packed.pathways

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` -> `[..., out_features]` through the active pathway."""
        # _buffers: past nn.Module's __getattr__, a tenth of a small product. A Parameter put in its place is not there.
        bias = self._buffers["bias"] if "bias" in self._buffers else self.bias
        return sparse_linear(x, self.packed, bias, pathway=self.active)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.packed = self.packed._apply(fn)
        if self.bias is not None:
            self.bias = self.bias.to(self.packed.device, self.packed.x_dtype)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self.packed
        masks = torch.stack([packed.mask(one).flatten() for one in packed.pathways])
        stored = {"values": packed.values, "block_mask": pack_bits(masks), "scale": packed.scale}
        destination.update({prefix + key: value for key, value in stored.items() if value is not None})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        own = {key: state_dict.get(prefix + key) for key in ("values", "block_mask", "scale")}
        rest = {key: value for key, value in state_dict.items() if key[len(prefix) :] not in own}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        absent = [prefix + key for key in ("values", "block_mask") if own[key] is None]
        if absent:
            missing.extend(absent)
            return
        try:
            blocks, columns = grid(self.packed.shape, self.packed.block)
            masks = unpack_bits(own["block_mask"], blocks * columns).view(len(self.pathways), blocks, columns)
            named = dict(zip(self.pathways, masks, strict=True))
            packed = PackedWeight(
                self.packed.shape,
                self.packed.block,
                own["values"].clone(),
                None if own["scale"] is None else own["scale"].clone(),
                named,
                self.packed.quantise_x,
            )
        except (RuntimeError, ValueError) as error:
            errors.append(f"{prefix}: {error}")
            return
        self.packed = packed.to(self.packed.device)

    def extra_repr(self) -> str:
        """The packed weight and the active pathway."""
        return f"{self.packed}, bias={self.bias is not None}, active={self.active}"
