"""An accelerated model under DistributedDataParallel."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import vitkernels as vk
from support.model_zoo import assert_close, timm_model
from torch import Tensor, nn

pytest.importorskip("timm")
WORLD = 2


def model_and_batch() -> tuple[nn.Module, Tensor]:
    model, images = timm_model(depth=1)
    assert len(vk.accelerate(model).replaced) == 1
    return model, torch.cat([images, images.flip(0) * 0.5])


def mean_loss_gradients(model: nn.Module, images: Tensor) -> None:
    model(images).square().sum(1).mean().backward()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    model, images = model_and_batch()
    parallel = nn.parallel.DistributedDataParallel(model)
    mean_loss_gradients(parallel, images.chunk(WORLD)[rank])
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_compute_the_gradients_of_one(tmp_path: Path):
    mp.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    model, images = model_and_batch()
    mean_loss_gradients(model, images)
    expected = {name: p.grad for name, p in model.named_parameters()}
    for rank in range(WORLD):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
