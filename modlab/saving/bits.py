"""Routers in a third of the bytes: rows of weights as integers of few bits, in planes of bits.

A hidden layer is nine tenths of a router and needs the least precision. Of a tensor `NAME` the file then
holds `NAME.planes`, uint8 [bits, n / 8], and `NAME.scales`, fp16 [..., D / 64]: the largest value in each
group of 64 along the last axis, over the largest integer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modlab.errors import ModlabError

GROUP = 64
"""Weights that share a scale."""
PLANES, SCALES = ".planes", ".scales"


def packed(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(planes, scales) of weights [..., D], D a multiple of 64."""
    groups = weights.detach().float().cpu().unflatten(-1, (-1, GROUP))
    top = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1) / top).clamp(min=1e-7).half()
    whole = (groups / scales.float()[..., None]).round().clamp(-top, top).int() + top
    eights = whole.reshape(-1, 8)
    order = 2 ** torch.arange(7, -1, -1)
    planes = [(((eights >> bit) & 1) * order).sum(1) for bit in range(bits)]
    return torch.stack(planes).to(torch.uint8), scales


def unpacked(planes: Tensor, scales: Tensor) -> Tensor:
    """The weights, fp32, in the shape that they had."""
    ones = (planes[..., None].int() >> torch.arange(7, -1, -1)) & 1
    whole = sum(plane.reshape(-1) << bit for bit, plane in enumerate(ones))
    centred = (whole - (2 ** (len(planes) - 1) - 1)).float()
    groups = centred.view(*scales.shape, GROUP) * scales.float()[..., None]
    return groups.flatten(-2)


def pack_routers(routers: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """Routers as a file holds them: packed where `bits` has the last part of the name, else fp16."""
    found: dict[str, Tensor] = {}
    for name, tensor in routers.items():
        few = bits.get(name.rpartition(".")[2])
        if few is None:
            found[name] = tensor.detach().half().cpu()
        else:
            found[name + PLANES], found[name + SCALES] = packed(tensor, few)
    return found


def unpack_routers(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds, packed tensors unpacked; others are left as they are.

    Raises:
        ModlabError: planes and scales do not belong together.
    """
    found = {name: tensor for name, tensor in stored.items() if not name.endswith((PLANES, SCALES))}
    for name in {key.rpartition(".")[0] for key in stored.keys() - found.keys()}:
        planes, scales = stored.get(name + PLANES), stored.get(name + SCALES)
        if not _belong_together(planes, scales):
            raise ModlabError(f"the bits of {name} and their scales do not belong together")
        assert planes is not None and scales is not None
        found[name] = unpacked(planes, scales)
    return found


def _belong_together(planes: Tensor | None, scales: Tensor | None) -> bool:
    if planes is None or scales is None or planes.dtype != torch.uint8 or planes.dim() != 2:
        return False
    return (
        2 <= len(planes) <= 16
        and scales.is_floating_point()
        and planes[0].numel() * 8 == scales.numel() * GROUP
    )
