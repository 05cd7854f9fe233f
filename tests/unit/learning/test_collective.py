from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from lifelong_ray.learning import TorchDistributed, train
from lifelong_ray.learning.model import build_model
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, assert_same_weights, make_images


def train_one(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3] * 6, seed=0)
    group = TorchDistributed()
    train(model, images, labels, config=CONFIG.base, seed=1, clock=TickingClock(), collective=group)
    mixed = [torch.ones(2, dtype=torch.float64), torch.full((1, 2), float(rank))]
    group.sum(mixed)
    assert mixed[0].tolist() == [2, 2]
    assert mixed[1].tolist() == [[1, 1]]
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()  # neither hangs up while the other still listens
    torch.distributed.destroy_process_group()
    # Gloo's threads may outlive the group and abort a process that ends in the usual way.
    os._exit(0)


def test_two_processes_over_gloo_train_what_one_does(tmp_path):
    torch.multiprocessing.spawn(train_one, args=(2, str(tmp_path)), nprocs=2)

    alone = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3] * 6, seed=0)
    train(alone, images, labels, config=CONFIG.base, seed=1, clock=TickingClock())
    models = []
    for rank in range(2):
        model = build_model(MODEL, 4, seed=0)
        model.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        models.append(model)
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], alone, tolerance=2e-4)


def test_without_a_process_group_there_is_a_plain_answer():
    with pytest.raises(ValueError, match="init_process_group"):
        TorchDistributed()
