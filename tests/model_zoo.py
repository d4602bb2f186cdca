"""Small models of timm and transformers with random weights, importable whichever torchvision is installed."""

from __future__ import annotations

import torch

# torchvision's wheel may be built for another torch; timm and transformers need only these two schemas of it.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    if not hasattr(torch.ops.torchvision, _schema.partition("(")[0]):
        _torchvision.define(_schema)
