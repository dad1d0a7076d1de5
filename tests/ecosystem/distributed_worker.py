"""A training that test_distributed.py runs as one process and under torchrun.

    python distributed_worker.py one FOLDER             the whole batch in one process
    torchrun ... distributed_worker.py ddp FOLDER       DistributedDataParallel
    torchrun ... distributed_worker.py fsdp FOLDER      FSDP2: fully_shard

Every process trains on its own rows of the same batches. Two runs are made: one without a break,
and one that saves a checkpoint in the middle and resumes it with a new model. The program saves,
for each run, the losses of all steps, the gradients of the first step and the last parameters.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

T, N, I, H = 6, 8, 5, 7
STEPS = 6


class Model(nn.Module):
    """A model of every kind of layer and cell module. It reads padded batches."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fusedrnn.FusedLSTM(I, H, 2, bidirectional=True, proj_size=3)
        self.gru = fusedrnn.FusedGRU(6, H, reset_after=False)
        self.rnn = fusedrnn.FusedRNN(H, H)
        self.lstm_cell = fusedrnn.FusedLSTMCell(H, H)
        self.gru_cell = fusedrnn.FusedGRUCell(H, H)
        self.rnn_cell = fusedrnn.FusedRNNCell(H, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        y, _ = self.gru(y, lengths=lengths)
        _, h_n = self.rnn(y, lengths=lengths)
        h, c = self.lstm_cell(h_n[-1])
        result: Tensor = self.rnn_cell(self.gru_cell(h) + c)
        return result


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of a step: x [T, N, I], lengths [N], target [N, 2]."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(T, N, I, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    target = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, lengths, target


def whole(t: Tensor) -> Tensor:
    """A copy of a tensor; a sharded tensor is gathered first."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def loss_of(model: nn.Module, step: int) -> Tensor:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = slice(rank * N // world, (rank + 1) * N // world)
    x, lengths, target = batch(step)
    loss: Tensor = (model(x[:, rows], lengths[rows]) - target[rows]).square().mean()
    return loss


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Any]:
    """Trains; returns the losses, the gradients of the first step and the last parameters."""
    losses, gradients = [], {}
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        if step == steps[0]:
            for name, p in bare(model).named_parameters():
                assert p.grad is not None, name
                gradients[name] = whole(p.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    parameters = {name: whole(p) for name, p in bare(model).named_parameters()}
    return {"losses": losses, "gradients": gradients, "parameters": parameters}


def make(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Model().double()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for child in (*model.children(), model):
            fully_shard(child, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def save(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    if kind == "fsdp":
        state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    elif not dist.is_initialized() or dist.get_rank() == 0:
        states = {"model": bare(model).state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, folder / "checkpoint.pt")
    if dist.is_initialized():
        dist.barrier()


def load(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    if kind == "fsdp":
        state, optimizer_state = get_state_dict(model, optimizer)
        states = {"model": state, "optimizer": optimizer_state}
        dcp.load(states, checkpoint_id=folder / "dcp")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
    else:
        states = torch.load(folder / "checkpoint.pt", weights_only=True)
        bare(model).load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])


def reduced_precision() -> dict[str, Any]:
    """The first gradients under a MixedPrecisionPolicy, with which parameters are bfloat16."""
    torch.manual_seed(0)
    model = Model()  # float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    seen: list[torch.dtype] = []
    model.lstm.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    assert isinstance(model, FSDPModule)
    loss_of(model, 0).backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"seen": seen, "gradients": gradients}


def work(kind: str, folder: Path) -> dict[str, Any]:
    """Makes both runs of one kind of training; returns their results."""
    model, optimizer = make(kind, seed=0)
    result: dict[str, Any] = {"parameter": type(next(model.parameters())).__name__}
    result["unbroken"] = train(model, optimizer, range(STEPS))

    model, optimizer = make(kind, seed=0)
    train(model, optimizer, range(STEPS // 2))
    save(kind, model, optimizer, folder)
    model, optimizer = make(kind, seed=1)  # load() must replace these other weights
    load(kind, model, optimizer, folder)
    result["resumed"] = train(model, optimizer, range(STEPS // 2, STEPS))
    if kind == "fsdp":
        result["bfloat16"] = reduced_precision()
    return result


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if kind == "one":
        torch.save(work(kind, folder), folder / f"{kind}.pt")
        return
    dist.init_process_group("gloo")
    # No DDP model may be alive when the process group is destroyed, and the interpreter must not
    # run its usual exit. docs/distributed.md gives the reasons.
    result = work(kind, folder)
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{kind}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
