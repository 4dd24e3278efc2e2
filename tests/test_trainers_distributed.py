"""Lightning's and Hugging Face's own DistributedDataParallel, on two ranks: as one process on the whole batch."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import test_integrations as one
import torch
from lightning.pytorch.strategies import DDPStrategy
from models import Toy
from ranks import launch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.xdist_group("ranks")

# Lightning takes the process group down when it has done with it, and so comes last.
ROADS: dict[str, dict[str, Any]] = {
    "huggingface": {},
    "huggingface, automatic": {"automatic": True},
    "huggingface, accumulated": {"accumulate": 2},
    "lightning": {},
    "lightning, weighted": {"heads": "weighted", "method": "uw"},
    "lightning, automatic": {"automatic": True},
    "lightning, accumulated": {"accumulate": 2},
}


def fit_lightning(rank: int, world: int, options: dict[str, Any]) -> Tensor:
    module = one.Module(**options)
    strategy = {} if world == 1 else {"strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = one.trainer_of(devices=world, use_distributed_sampler=False, **strategy)
    # The ranks' batches make up those of one process.
    trainer.fit(module, DataLoader(TensorDataset(one.data()[rank::world]), 8 // world))
    return one.values(module.toy)


def fit_huggingface(rank: int, world: int, options: dict[str, Any]) -> Tensor:
    options = dict(options)
    arguments = one.arguments_of(
        Path(tempfile.gettempdir()),
        ddp_backend="gloo" if world > 1 else None,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=options.pop("accumulate", 1),
    )
    model = Toy(dtype=torch.float32)
    one.ToyTrainer(model=model, args=arguments, train_dataset=one.Samples(), shared=one.shared, **options).train()
    return one.values(model)


def fit(name: str, rank: int = 0, world: int = 1) -> Tensor:
    return (fit_lightning if name.startswith("lightning") else fit_huggingface)(rank, world, ROADS[name])


def case(name: str, rank: int, world: int) -> Any:
    """One rank's part, in the environment that torchrun would have made."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "test"}
    return fit(name, rank, world)


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    return launch(2, "test_trainers_distributed", list(ROADS))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ROADS)
def test_two_ranks_equal_one_process(name: str, two: dict[str, list[Any]]) -> None:
    first, second = two[name]
    assert isinstance(first, Tensor), first
    assert torch.equal(first, second)
    torch.testing.assert_close(first, fit(name), rtol=1e-4, atol=1e-5)
