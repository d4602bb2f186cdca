"""Photographs: those that ship with scikit-learn and scikit-image, or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["Photo", "open_photo", "sample_photos"]

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet, as in DINOv2's training
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Photo(NamedTuple):
    name: str
    image: Image.Image

    def square(self, size: int) -> Image.Image:
        """The largest centred square, resampled to ``size`` pixels a side."""
        return ImageOps.fit(self.image, (size, size), Image.Resampling.BICUBIC)

    def pixels(self, size: int) -> Tensor:
        """The square as the model takes it: ``(1, 3, size, size)`` float32, normalised."""
        image = torch.from_numpy(np.array(self.square(size))).permute(2, 0, 1)  # [3, size, size]
        return ((image / 255 - MEAN) / STD)[None].contiguous()


def open_photo(path: Path) -> Photo:
    """Any file that Pillow reads, turned upright."""
    with Image.open(path) as image:
        return Photo(path.stem, ImageOps.exif_transpose(image).convert("RGB"))


def sample_photos() -> list[Photo]:
    """Six photographs that are in the wheels; nothing is downloaded."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    arrays = {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    arrays |= {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return [Photo(name, Image.fromarray(array)) for name, array in arrays.items()]
