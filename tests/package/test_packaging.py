"""The results of the build: object files and libraries without stray symbols, an sdist, a wheel.

FUSEDRNN_OTHER_PYTHON lists Pythons with another version or another torch, separated as in PATH. The
smoke test of the wheel then runs under each of them, and its torch must have the symbols that the
libraries need. If it is a CUDA build, the CUDA library is loaded there too.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import setup_build
from tests.kit.packaging import (
    LIBRARY,
    ROOT,
    SMOKE_TEST,
    make_nvcc,
    quick_compilers,
    run,
)

CUDA_LIBRARY = ROOT / "fusedrnn" / "_cuda.so"
OTHER_PYTHONS = [p for p in os.environ.get("FUSEDRNN_OTHER_PYTHON", "").split(os.pathsep) if p]

# Functions that torch before 2.13 lacks. The libraries work without them.
WEAK = {
    "_C.so": {"torch_exception_get_what_without_backtrace"},
    "_cuda.so": {"torch_exception_get_what_without_backtrace", "torch_stream_native_handle"},
}
# Symbols that gcc's start-up code uses if they exist.
WEAK_OF_GCC = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


# A program for a CUDA build of torch on a machine where it finds no GPU.
NO_GPU_TEST = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import fusedrnn
assert torch.version.cuda, "no CUDA build"
assert not torch.cuda.is_available()
fusedrnn.show_config()
layer = fusedrnn.FusedLSTM(3, 5)
assert layer(torch.randn(7, 2, 3))[0].shape == (7, 2, 5)
# The current stream of a GPU has to come from one of these.
import ctypes, os
in_torch = ctypes.CDLL("libtorch_cpu.so", os.RTLD_NOLOAD)
in_torch_cuda = ctypes.CDLL("libtorch_cuda.so", os.RTLD_NOLOAD)
assert hasattr(in_torch, "torch_stream_native_handle") or hasattr(
    in_torch_cuda, "aoti_torch_get_current_cuda_stream"
)
# Without these products are slower to start: ops are then called by their names.
for function in ("mm_out", "mm_dtype_out", "addmm_out"):
    assert hasattr(in_torch_cuda, "aoti_torch_cuda_" + function), function
for device in ("cuda", "cuda:1"):
    try:
        layer.to(device)
    except Exception as error:
        print(f"to {device}: {type(error).__name__}: {error}")
"""


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol that `nm` finds in `path`."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    lines = run("nm", "--format=posix", *options, path).splitlines()
    return [(fields[1], fields[0]) for fields in map(str.split, lines) if len(fields) >= 2]


def dynamic_section(library: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    return run("readelf", "--dynamic", "--wide", library)


@pytest.fixture(params=[LIBRARY, CUDA_LIBRARY], ids=lambda path: path.name)
def library(request: pytest.FixtureRequest) -> Path:
    if not request.param.exists():
        pytest.skip(f"{request.param.name} was not built")
    return request.param


@pytest.mark.parametrize("isa", setup_build.isa_flags())
def test_kernel_object_offers_the_linker_only_its_table(isa):
    """The linker could choose a weak or global function compiled with AVX-512 for any caller."""
    path = setup_build.BUILD_DIR / "cpu" / f"kernels_{isa}.o"
    assert (ROOT / "csrc" / "cpu" / f"kernels_{isa}.cpp").exists()
    if not path.exists():
        pytest.skip(f"{path} is not there: the library was not built in this tree")
    found = symbols(path)
    # nm prints local symbols in lower case; the only exception is u, a unique global symbol.
    offered = [(kind, name) for kind, name in found if kind in "u" or kind.isupper()]
    offered = [(kind, name) for kind, name in offered if kind != "U"]
    assert len(offered) == 1, offered
    assert offered[0][0] in "DR", f"{offered[0]} is not data"
    # The object needs only C functions of others, such as memcpy.
    asked = [name for kind, name in found if kind in "Uwv"]
    assert [name for name in asked if name.startswith("_Z")] == []


def test_every_kernel_file_has_flags_and_every_instruction_set_a_file():
    files = {path.stem for path in (ROOT / "csrc" / "cpu").glob("kernels_*.cpp")}
    assert {f"kernels_{isa}" for isa in setup_build.isa_flags()} <= files
    compiled = {path.stem for path in setup_build.engine_units()}
    assert {f"kernels_{isa}" for isa in setup_build.isa_flags()} <= compiled


def test_library_asks_only_for_the_stable_abi_and_the_runtime(library):
    undefined = symbols(library, "--dynamic", "--undefined-only")
    assert undefined
    for kind, name in undefined:
        bare, _, version = name.partition("@")
        assert not re.match(r"_?Py[A-Z_]", bare), f"{name} is Python's"
        if bare.startswith("_Z"):
            # Symbols of libstdc++ have a version, and those of at::, c10:: and torch:: have none.
            assert version.startswith(("GLIBCXX", "CXXABI")), f"{name} is not libstdc++'s"
        elif not version and kind == "U":
            assert bare.startswith(("aoti_torch_", "torch_")), f"{name} is not the stable ABI's"


def test_weak_symbols_are_those_that_the_library_does_not_need(library):
    """For each weak symbol the sources must have code that works without it."""
    undefined = symbols(library, "--dynamic", "--undefined-only")
    weak = {name for kind, name in undefined if kind in "wv" and "@" not in name}
    assert weak - WEAK_OF_GCC == WEAK[library.name]


@pytest.mark.parametrize("python", [sys.executable, *OTHER_PYTHONS])
def test_torch_has_the_symbols_that_the_library_needs(library, python):
    found = run(python, "-I", "-c", "import torch; print(torch.__version__, torch.__file__)")
    version, path = found.split(maxsplit=1)
    torch_cpu = Path(path.strip()).parent / "lib" / "libtorch_cpu.so"
    offered = {
        name.partition("@")[0] for _, name in symbols(torch_cpu, "--dynamic", "--defined-only")
    }
    undefined = symbols(library, "--dynamic", "--undefined-only")
    asked = {name for kind, name in undefined if kind == "U" and "@" not in name}
    assert asked
    assert asked <= offered, f"torch {version} lacks {sorted(asked - offered)}"
    # From 2.13 on the functions themselves are called and not their replacements.
    if tuple(map(int, version.split(".")[:2])) >= (2, 13):
        assert WEAK[library.name] <= offered


def test_library_defines_no_dynamic_symbol(library):
    assert symbols(library, "--dynamic", "--defined-only") == []


def test_library_needs_torch_cpu_and_no_other_library_of_torch_python_or_cuda(library):
    section = dynamic_section(library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", section))
    assert "libtorch_cpu.so" in needed
    runtime = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed - {"libtorch_cpu.so"} <= runtime
    assert "RPATH" not in section
    assert "RUNPATH" not in section


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FUSEDRNN_WERROR", "on", "FUSEDRNN_WERROR must be 0 or 1, got 'on'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("CXX", "no-such-compiler", "'no-such-compiler' is not on PATH"),
    ],
)
def test_build_names_the_variable_that_is_wrong(monkeypatch, variable, value, message):
    # Nothing is compiled even if the check is missing.
    monkeypatch.setattr(setup_build.subprocess, "run", lambda *_, **__: pytest.fail("compiles"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(setup_build.BuildError, match=re.escape(message)):
        setup_build.build_library()


@pytest.fixture
def torch_and_nvcc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[bool, str | None], None]:
    """A function that makes the build see a torch with or without CUDA, and an nvcc or none."""

    def choose(torch_has_cuda: bool, release: str | None) -> None:
        (tmp_path / "lib").mkdir()
        if torch_has_cuda:
            (tmp_path / "lib" / "libtorch_cuda.so").touch()
        if release is not None:
            make_nvcc(tmp_path, f"Cuda compilation tools, release {release}")
        monkeypatch.setattr(setup_build, "torch_dir", lambda: tmp_path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return choose


@pytest.mark.parametrize(
    ("asked", "torch_has_cuda", "release", "builds", "why"),
    [
        ("", True, "13.0", True, "torch has CUDA, .*nvcc"),
        ("", True, "12.8", True, "torch has CUDA, .*nvcc"),
        ("", True, None, False, "nvcc is not in CUDA_HOME=.*; FUSEDRNN_CUDA=1 makes that an err"),
        ("", True, "12.6", False, r"the CUDA library needs nvcc 12\.8 or later, .*nvcc is 12\.6; "),
        ("", True, "?", False, ".*nvcc --version names no release: 'Cuda .*; FUSEDRNN_CUDA=1 "),
        ("", False, "13.0", False, "this torch is no CUDA build; FUSEDRNN_CUDA=1 builds"),
        ("1", False, "13.0", True, "FUSEDRNN_CUDA=1, .*nvcc"),
        ("0", True, "13.0", False, "FUSEDRNN_CUDA=0"),
    ],
)
def test_when_the_cuda_library_is_built(
    torch_and_nvcc, monkeypatch, asked, torch_has_cuda, release, builds, why
):
    torch_and_nvcc(torch_has_cuda, release)
    monkeypatch.setenv("FUSEDRNN_CUDA", asked)
    chosen, said = setup_build.cuda_choice()
    assert chosen == builds
    assert re.match(why, said)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("value", "release", "message"),
    [
        ("yes", "13.0", "FUSEDRNN_CUDA must be 0 or 1, got 'yes'"),
        ("1", None, "FUSEDRNN_CUDA=1, but nvcc is not in CUDA_HOME.*12.8 or later"),
        ("1", "11.8", r"FUSEDRNN_CUDA=1, but .* nvcc 12\.8 or later, .*nvcc is 11\.8: install"),
        ("1", "?", "FUSEDRNN_CUDA=1, but .*nvcc --version names no release"),
    ],
)
def test_a_cuda_library_that_was_asked_for_and_cannot_be_built(
    torch_and_nvcc, monkeypatch, value, release, message
):
    torch_and_nvcc(torch_has_cuda=True, release=release)
    monkeypatch.setenv("FUSEDRNN_CUDA", value)
    with pytest.raises(setup_build.BuildError, match=message):
        setup_build.cuda_choice()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("70", "FUSEDRNN_CUDA_ARCH must be 75 or later, got 70"),
        ("sm_80", """FUSEDRNN_CUDA_ARCH must be like "80;90" or "8.0;9.0+PTX", got 'sm_80'"""),
        (";", """FUSEDRNN_CUDA_ARCH must be like "80;90" or "8.0;9.0+PTX", got ';'"""),
        ("80+PTX;90+PTX", "FUSEDRNN_CUDA_ARCH must have +PTX once at most, got '80+PTX;90+PTX'"),
    ],
)
def test_architectures_that_are_refused(monkeypatch, value, message):
    monkeypatch.setenv("FUSEDRNN_CUDA_ARCH", value)
    with pytest.raises(setup_build.BuildError, match=re.escape(message)):
        setup_build.architectures()


def test_architectures(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_CUDA_ARCH", raising=False)
    assert setup_build.architectures() == ([75, 80, 90, 100, 120], 120)
    for value in ("8.0;9.0", "80 90", "90,80"):
        monkeypatch.setenv("FUSEDRNN_CUDA_ARCH", value)
        assert setup_build.architectures() == ([80, 90], None)
    monkeypatch.setenv("FUSEDRNN_CUDA_ARCH", "80;12.0+PTX")
    flags = " ".join(setup_build.architecture_flags())
    assert flags.count("code=sm_") == 2
    assert "arch=compute_120,code=compute_120" in flags


@pytest.mark.parametrize(("release", "packed"), [("12.8", False), ("13.0", True)])
def test_device_code_is_packed_where_every_driver_unpacks_it(tmp_path, release, packed):
    make_nvcc(tmp_path, f"Cuda compilation tools, release {release}")
    units = setup_build.cuda_units(str(tmp_path / "bin" / "nvcc"), [])
    kernels = [flags for source, flags in units.items() if source.suffix == ".cu"]
    assert kernels
    assert all(("--compress-mode=size" in flags) == packed for flags in kernels)


def device_code(library: Path) -> set[tuple[str, int]]:
    """("sm" or "ptx", architecture) of each piece of device code in a library's fat binaries."""
    found = set()
    content = library.read_bytes()
    at = 0
    # A fat binary is struct { magic, version: 16 bits, header: 16 bits, size: 64 bits } and pieces.
    while (at := content.find(b"\x50\xed\x55\xba", at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", content, at + 4)
        piece, end = at + header, at + header + size
        at += 4
        if version != 1 or end > len(content):
            continue  # these four bytes are not the magic of a fat binary
        while piece < end:
            # A piece is struct { kind: 16 bits, 16 bits, header: 32 bits, size: 64 bits, ... }; the
            # architecture is at byte 28.
            kind, _, its_header, its_size = struct.unpack_from("<HHIQ", content, piece)
            (arch,) = struct.unpack_from("<I", content, piece + 28)
            found.add(({1: "ptx", 2: "sm"}[kind], arch))
            piece += its_header + its_size
    return found


def test_cuda_library_has_code_for_the_architectures_that_it_lists():
    if not CUDA_LIBRARY.exists():
        pytest.skip(f"{CUDA_LIBRARY.name} was not built")
    # The library is loaded in another process, so that the ops of this process do not change.
    program = "import sys, torch; [torch.ops.load_library(p) for p in sys.argv[1:]]; "
    said = run(
        *(sys.executable, "-c", program + "print(torch.ops.fusedrnn.cuda_info())"),
        *(LIBRARY, CUDA_LIBRARY),
    )
    words = re.search("architectures (.*)", said)[1].split(";")
    expected = {("sm", int(word.removesuffix("+PTX"))) for word in words}
    expected |= {("ptx", int(word[:-4])) for word in words if word.endswith("+PTX")}
    assert device_code(CUDA_LIBRARY) == expected


@pytest.mark.parametrize("python", [sys.executable, *OTHER_PYTHONS])
def test_cuda_library_under_a_cuda_build_of_torch_without_a_gpu(tmp_path, python):
    cuda = run(python, "-I", "-c", "import torch; print(torch.version.cuda or '')").strip()
    if not cuda:
        pytest.skip(f"torch of {python} is no CUDA build; FUSEDRNN_OTHER_PYTHON can name another")
    if not CUDA_LIBRARY.exists():
        pytest.skip(f"{CUDA_LIBRARY.name} was not built")
    # This hides a GPU if there is one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = run(python, "-I", "-c", NO_GPU_TEST, ROOT, cwd=tmp_path, env=environment)
    assert re.search(f"CUDA library +sm_.*, CUDA runtime .*{CUDA_LIBRARY}", said), said
    assert re.search("CUDA devices +none: torch finds no GPU or no driver", said), said
    # These are torch's messages.
    assert len(re.findall("^to cuda.*(NVIDIA driver|CUDA GPUs)", said, re.MULTILINE)) == 2, said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The folder of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    run(*setup, "sdist", "--dist-dir", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Old releases of Python lack the argument `filter`, and trust all files.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, which is built from the sdist with pip."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    # If the wheel has a CUDA library, one architecture is enough. This one is compiled fastest: it
    # has no kernels on tensor cores and none with clusters. Nothing that is compiled on the way is
    # kept, and `make build` has judged the warnings.
    tools = tmp_path_factory.mktemp("tools")
    environment = os.environ | quick_compilers(tools)
    environment |= {"FUSEDRNN_CUDA_ARCH": "75", "FUSEDRNN_CUDA_KEEP": "", "FUSEDRNN_WERROR": ""}
    command = [*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist]
    run(*command, env=environment)
    (path,) = folder.iterdir()
    return path


def files_under(folder: Path, *parts: str) -> set[str]:
    found = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in found}
    return {name for name in names if not re.search(r"\.(pyc|so|o|d)$", name)}


def test_sdist_holds_the_sources_and_nothing_built(sdist):
    assert files_under(sdist, "csrc", "fusedrnn") == files_under(ROOT, "csrc", "fusedrnn")
    for name in ("setup.py", "setup_build.py", "Makefile", "requirements.txt", "README.md"):
        assert (sdist / name).is_file(), name
    assert (sdist / "tests" / "package" / "test_packaging.py").is_file()
    built = [path for path in sdist.rglob("*") if path.suffix in (".so", ".o", ".pyc")]
    assert built == []


@pytest.mark.slow
def test_wheel_serves_every_python_and_holds_the_package_alone(wheel):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (description,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        lines = archive.read(description).decode().splitlines()
    assert "Root-Is-Purelib: false" in lines
    assert "Tag: py3-none-linux_x86_64" in lines
    package = {name for name in names if ".dist-info/" not in name}
    libraries = {"fusedrnn/_C.so"}
    if setup_build.cuda_choice()[0]:
        libraries.add("fusedrnn/_cuda.so")
    assert package == files_under(ROOT, "fusedrnn") | libraries
    assert "fusedrnn/py.typed" in package


@pytest.mark.slow
def test_wheel_works_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for python in [sys.executable, *OTHER_PYTHONS]:
        # With -I neither PYTHONPATH nor the current folder is on the path.
        print(run(python, "-I", "-c", SMOKE_TEST, tmp_path / "site", cwd=tmp_path))
