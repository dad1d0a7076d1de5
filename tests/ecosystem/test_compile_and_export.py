"""Inductor, saved exports and AOTInductor compute the same as eager mode; TorchScript is refused.

`tests/layers/test_compile.py` captures every cell and every kind of call with Dynamo and
torch.export. The tests here compile the captured graphs, save them and load them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fusedrnn
from fusedrnn._library import LIBRARY
from tests.kit.layers import randn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Maps sequences [N, T, 3] and their lengths to scores [N, T, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fusedrnn.FusedLSTM(3, 6, batch_first=True, bidirectional=True)
        self.gru = fusedrnn.FusedGRU(12, 5, batch_first=True, reset_after=False)
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        y, h_n = self.gru(torch.relu(y), lengths=lengths)
        result: Tensor = self.linear(y) + h_n[0].mean(1)[:, None, None]
        return result


def batch(N: int, T: int) -> tuple[Tensor, Tensor]:
    return randn(N, T, 3), torch.arange(N) % (T + 1)


def dynamic_shapes() -> Any:
    N, T = torch.export.Dim("N", min=2, max=64), torch.export.Dim("T", min=2, max=100)
    return {0: N, 1: T}, {0: N}


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_inductor_trains_at_every_length_without_compiling_again() -> None:
    model = Model().double()
    run = torch.compile(model, fullgraph=True, dynamic=True)
    run(*batch(4, 6)).square().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N, T in ((4, 7), (5, 6), (3, 19)):
            inputs = batch(N, T)
            actual, expected = run(*inputs), model(*inputs)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                gradients(actual.square().sum(), model),
                gradients(expected.square().sum(), model),
                rtol=1e-10,
                atol=1e-10,
            )


def compilations(prepare: Callable[[Tensor], None], **options: Any) -> int:
    """How many graphs are compiled for twelve calls with different T and N."""
    counter = CompileCounter()
    model = Model().double()
    run = torch.compile(model, fullgraph=True, backend=counter, **options)
    for k in range(12):
        x, lengths = batch(3 + k % 5, 4 + k)
        prepare(x)
        torch.testing.assert_close(run(x, lengths), model(x, lengths), rtol=1e-10, atol=1e-10)
    return counter.frame_count


def test_number_of_compilations_with_and_without_dynamic_sizes() -> None:
    def nothing(_: Tensor) -> None:
        pass

    # Dynamo makes a size dynamic when it first changes. Both N and T change at the second call.
    assert compilations(nothing) == 2
    assert compilations(nothing, dynamic=True) == 1
    assert compilations(lambda x: torch._dynamo.mark_dynamic(x, (0, 1))) == 1


FRESH_PROCESS = """
import sys
import torch

folder, library, step = sys.argv[1:]
x, lengths, expected = torch.load(folder + "/case.pt")

def check(run):
    with torch.no_grad():
        torch.testing.assert_close(run(x, lengths), expected, rtol=1e-5, atol=1e-6)

if step == "aoti":
    try:
        torch._inductor.aoti_load_package(folder + "/model.pt2")
    except RuntimeError as error:
        print(error)
    torch.ops.load_library(library)
    check(torch._inductor.aoti_load_package(folder + "/model.pt2"))
else:
    import fusedrnn
    check(torch.export.load(folder + "/exported.pt2").module())
print("fusedrnn" in sys.modules)
"""


def fresh_process(folder: Path, step: str) -> list[str]:
    """Loads a saved program in a new Python and runs it; returns the lines that are printed."""
    words = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(LIBRARY.path), step]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch raises it, from copyreg
def test_saved_programs_run_in_a_fresh_process(tmp_path: Path) -> None:
    model = Model().eval()
    with torch.no_grad():
        x, lengths = batch(4, 6)
        program = torch.export.export(model, (x.float(), lengths), dynamic_shapes=dynamic_shapes())
        x, lengths = batch(7, 11)
        torch.save((x.float(), lengths, model(x.float(), lengths)), tmp_path / "case.pt")
    torch.export.save(program, tmp_path / "exported.pt2")
    assert fresh_process(tmp_path, "exported") == ["True"]

    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    # A compiled program needs the library with our ops, and not the Python package.
    said = fresh_process(tmp_path, "aoti")
    assert said == ["Could not find schema for fusedrnn::forward.", "False"]


LAYERS = [
    fusedrnn.FusedLSTM(3, 5),
    fusedrnn.FusedGRU(3, 5, reset_after=False),
    fusedrnn.FusedRNN(3, 5),
    fusedrnn.FusedLSTMCell(3, 5),
    fusedrnn.FusedGRUCell(3, 5),
    fusedrnn.FusedRNNCell(3, 5),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_torchscript_is_refused_in_words(layer: nn.Module) -> None:
    x = torch.randn(2, 3) if "Cell" in type(layer).__name__ else torch.randn(4, 2, 3)
    message = f"TorchScript does not support {type(layer).__name__}. Use torch.export"
    captures: list[tuple[str, Callable[[nn.Module], Any]]] = [
        ("script", torch.jit.script),
        ("trace", lambda m: torch.jit.trace(m, (x,))),
    ]
    for name, capture in captures:
        for model in (layer, nn.Sequential(layer), nn.ModuleList([layer])[0]):
            with pytest.raises(RuntimeError, match=f"torch.jit.{name}: {message}"):
                capture(model)
            with torch.no_grad(), pytest.raises(RuntimeError, match=message):
                capture(model)
    layer(x)  # the layer still works


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_to_torch_is_the_way_to_torchscript() -> None:
    # torch.nn.LSTM can only be scripted inside another module.
    model = nn.Sequential(fusedrnn.FusedLSTM(3, 5, num_layers=2)).double()
    scripted = torch.jit.script(fusedrnn.to_torch(model))
    x = randn(4, 2, 3)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-12, atol=1e-12)
