"""The first steps of a user: the messages of a build, and imports in the repository's folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup_build
from fusedrnn import _library
from tests.kit.packaging import LIBRARY, ROOT, make_nvcc


@pytest.fixture
def build_without_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Builds go to a new folder, and ninja does not run its commands."""
    real = subprocess.run

    def run_nothing_but_questions(command, **options):
        if Path(command[0]).name == "ninja" and "-n" not in command:
            return subprocess.CompletedProcess(command, 0)
        return real(command, **options)

    monkeypatch.setattr(setup_build.subprocess, "run", run_nothing_but_questions)
    monkeypatch.setattr(setup_build, "BUILD_DIR", tmp_path / "library")
    monkeypatch.setattr(setup_build, "CUDA_BUILD_DIR", tmp_path / "cuda")


def test_build_says_how_many_files_it_compiles(build_without_compiling, monkeypatch, capsys):
    monkeypatch.setenv("MAX_JOBS", "2")
    setup_build.build_library()
    said = capsys.readouterr().out
    number = len({**setup_build.engine_units(), **setup_build.torch_units()})
    assert f"{number} files, 2 at a time, about 1 min\n" in said
    assert f"({', '.join(setup_build.isa_flags())}): " in said
    one = setup_build._time_needed([setup_build.CSRC / "cpu" / "layer.cpp"])
    assert one == "1 file, 2 at a time, less than a minute"


def test_build_says_how_to_leave_the_cuda_library_out(
    build_without_compiling, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("FUSEDRNN_CUDA_ARCH", "80;90+PTX")
    monkeypatch.setattr(setup_build, "cuda_folders", lambda _: (["-isystem", "x"], ["-Lx"]))
    make_nvcc(tmp_path, "Cuda compilation tools, release 13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    setup_build.build_cuda_library()
    said = capsys.readouterr().out
    assert re.search(r"\(sm_80, sm_90, PTX of 90; FUSEDRNN_CUDA=0 leaves it out\): 16 files", said)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (
            "/nowhere/pip-build-env-1a2b/overlay/lib",
            "this is an isolated build, .*no torch. Build with `pip install -v --no-b",
        ),
        (
            "/nowhere/uv/builds-v0/.tmpabc/lib",
            "this is an isolated build, .*--no-build-isolation .`",
        ),
        ("/nowhere/lib", "torch cannot be imported by .*: install torch there first"),
    ],
)
def test_build_without_torch_ends_before_torch_is_downloaded(folder, said, tmp_path):
    """pip asks for the metadata, downloads the packages that they require, and then builds."""
    program = (
        "import runpy, sys; sys.modules['torch'] = None; sys.path.append(sys.argv[1]); "
        "sys.argv[:] = ['setup.py', 'dist_info', '--output-dir', sys.argv[2]]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(f"error: {said}", done.stderr), done.stderr


@pytest.mark.parametrize("has_torch", [False, True])
def test_make_says_which_torch_pip_may_fetch_before_it_does(tmp_path, has_torch):
    """A CUDA build is several GB, so the message that says how to avoid it must come first."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # This program replaces pip and prints its arguments.
    script = [
        "#!/bin/sh",
        'case "$*" in',
        f"tools/missing*) echo {'ninja==1.13.2' if has_torch else 'torch==2.13.0'};;",
        '*) echo "python $*";;',
        "esac",
    ]
    python.write_text("\n".join(script) + "\n")
    python.chmod(0o755)
    environment = python.parents[1]
    target = f"{environment}/.fusedrnn/requirements"
    said = subprocess.run(
        ["make", "-C", ROOT, f"VENV={environment}", target],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "python -m pip --disable" in said or "python -m pip install" in said
    before = said[: said.index("python -m pip")]
    assert ("several GB" in before) != has_torch
    assert ("VENV=path/to/environment" in before) != has_torch


# The files with which Python imports fusedrnn from the repository.
TREE = ("fusedrnn/*.py", "setup_build.py")


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of these files, without compiled libraries."""
    tree = tmp_path / "tree"
    for source in (path for pattern in TREE for path in ROOT.glob(pattern)):
        target = tree / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return tree


def import_in(folder: Path, *, path: Path | None = None) -> str:
    """The output of `python -m fusedrnn` in a folder, and the last line of its errors."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-m", "fusedrnn"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr.strip().split("\n")[-1]


def test_sources_run_with_what_pip_built_in_them(source_tree):
    """After `pip install .`, `python -m fusedrnn` in the repository imports from its own folder."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is not there: the library was not built in this tree")
    said = import_in(source_tree)
    assert f"{source_tree}/fusedrnn holds the sources of fusedrnn, and nothing was com" in said
    assert f"with `pip install -v --no-build-isolation {source_tree}`" in said
    built = source_tree / "build" / "library" / "_C.so"
    built.parent.mkdir(parents=True)
    shutil.copy(LIBRARY, built)
    assert re.search(f"library +{built}\n", import_in(source_tree))


def test_sources_that_hide_an_installed_package_say_so(source_tree, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(source_tree / "fusedrnn", site / "fusedrnn")
    said = import_in(tmp_path, path=site)
    assert f"ImportError: fusedrnn: the compiled library _C.so is not in {site}/fusedrnn: " in said
    assert "Install fusedrnn again" in said
    (site / "fusedrnn" / "_C.so").write_text("no library")
    assert (
        f"They hide the fusedrnn that is installed in {site}/fusedrnn: run Python in another "
        f"folder than {source_tree}"
    ) in import_in(source_tree, path=site)
    said = import_in(tmp_path, path=site)
    assert "_C.so cannot be loaded with torch" in said
    assert "2.11 or later is needed" in said


def test_a_library_of_other_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks_a_fact = "isa avx2\npairs 0\ncell name=lstm gates=4"
    monkeypatch.setattr(_library.torch.ops.fusedrnn, "info", lambda: lacks_a_fact)
    with pytest.raises(ImportError, match=r"_C\.so was compiled from other sources .* it again"):
        _library._load()
