"""What the tests of several processes run in the others; they find it by name, and import little with it."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from tests.helpers import on_cpu, relative_error, same_values, settled


def run_apart(work: Callable[..., None], processes: int, *args: Any) -> None:
    """Run `work(rank, *args)` in so many fresh processes at once; an exception there is one here."""
    mp.spawn(work, args=args, nprocs=processes)


def small_net() -> nn.Sequential:
    """A network with BatchNorm, the same in every process."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    return settled(nn.Sequential(*layers))


def example() -> torch.Tensor:
    """The same batch for it in every process."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def add_one(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    """A hook that can be pickled."""
    return result + 1


def serve(_: int, model: Any, expected: torch.Tensor) -> None:
    """In another process a model that was sent there runs an engine, and has what it had."""
    assert model.report().builds == 0
    assert (model._state.options.precision, model._state.options.max_runners) == ("fp16", 3)
    with torch.no_grad():
        assert torch.equal(model(example()), expected)
    assert (model.report().builds, model.report().calls_by_module) == (1, 0)


def compile_and_check(rank: int, backend: str, barrier: Path) -> None:
    """Compile the same module as the other process, at the same time."""
    model = on_cpu(small_net(), backend=backend)
    (barrier / str(rank)).touch()
    while len(os.listdir(barrier)) < 2:
        pass
    with torch.no_grad():
        for scale in (1, 3):
            x = example() * scale
            assert relative_error(model(x), model.module(x)) < 2e-6
    assert (model.report().builds, model.report().calls_by_module) == (1, 0)


def train_distributed(rank: int, rendezvous: Path) -> None:
    """Two steps of DistributedDataParallel around a compiled module and around a plain one, then an evaluation."""
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=2)
    try:
        plain = small_net().train()
        model = on_cpu(copy.deepcopy(plain))
        if rank == 1:
            with torch.no_grad():  # the first process's weights are everyone's
                for parameter in (*plain.parameters(), *model.parameters()):
                    parameter.zero_()
        nets = [DistributedDataParallel(model.train()), DistributedDataParallel(plain)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
        for step in range(2):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert ours.grad is not None
                assert torch.equal(ours.grad, theirs.grad)
            assert same_values(model, plain.state_dict())
            _evaluate(nets, model, x, calls=step + 1)
        _same_everywhere(model)
    finally:
        dist.destroy_process_group()


def _evaluate(nets: list[DistributedDataParallel], model: Any, x: torch.Tensor, calls: int) -> None:
    """The first process's BatchNorm statistics are everyone's: the wrapper sends them before each forward."""
    with torch.no_grad():
        ours, theirs = (net.eval()(x) for net in nets)
    assert relative_error(ours, theirs) < 2e-6
    report = model.report()
    assert (report.builds, report.calls_by_engine, report.calls_by_module) == (1, calls, calls)
    for net in nets:
        net.train()


def _same_everywhere(model: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


class Embedded(Dataset[torch.Tensor]):
    """A data set whose items a compiled model makes."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            result = self.model(example() * (index + 1))
        assert self.model.report().calls_by_module == 0
        return result
