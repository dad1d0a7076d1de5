"""Compiles csrc/ with ninja, a C++ compiler and, for the CUDA library, nvcc.

setup.py builds fusedrnn/_C.so and fusedrnn/_cuda.so with it, and several tests build other binaries
from the same sources and flags. It needs neither setuptools nor an import of torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD_DIR = ROOT / "build" / "library"
CUDA_BUILD_DIR = ROOT / "build" / "cuda"

# The oldest torch with which the library is tested. The sources declare functions of later versions
# as weak symbols (csrc/torch/tensors.h).
OLDEST_TORCH = (2, 11)
# The version of the stable ABI that the library needs: 2.10 is the lowest that has all its calls.
TORCH_TARGET_VERSION = "0x020a000000000000"

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2]
_X86_ISAS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": ["-mavx512bf16", *_AVX512],
}

EXPORTS = CSRC / "torch" / "exports.map"

# The default of FUSEDRNN_CUDA_ARCH: machine code for each generation of GPUs, and PTX, from which
# the driver makes machine code for future generations.
RELEASE_ARCHITECTURES = "75;80;90;100;120+PTX"
# The first generation of GPUs that has the kernels' instructions.
OLDEST_ARCHITECTURE = 75
# The first nvcc that compiles for all of RELEASE_ARCHITECTURES.
OLDEST_NVCC = (12, 8)

# The source files to compile, each with the flags for it alone.
Units = Mapping[Path, Iterable[str]]


class BuildError(RuntimeError):
    """The build cannot continue; the message says what to change."""


def _switch(name: str) -> bool | None:
    """The environment variable `name` as a switch, or None if it is unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def isa_flags() -> dict[str, list[str]]:
    """The instruction sets for which the library is compiled on this architecture, with flags.

    `csrc/cpu/kernels_<name>.cpp` is compiled with the flags of `name`, even if this CPU does not
    support them, because the library chooses an instruction set when it is loaded.
    """
    isas = _X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
    return {isa: list(flags) for isa, flags in isas.items()}


def common_flags() -> list[str]:
    """The flags of every source file, in the library and in the tests' binaries."""
    return [
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
        # A multiply-add is fused only where the source says so, with every instruction set.
        *("-ffp-contract=off", "-fno-math-errno"),
        # g++ 12 warns wrongly about overlapping copies in C++20's std::string (GCC bug 105329).
        *("-Wall", "-Wextra", "-Wno-restrict"),
        *(["-Werror"] if _switch("FUSEDRNN_WERROR") else []),
        f"-I{CSRC}",
        f"-ffile-prefix-map={ROOT}/=",
    ]


def _is_isolated() -> bool:
    """Whether pip, build or uv made an environment for this build alone."""
    return any(re.search(r"build-env-|/builds-v\d", folder) for folder in (sys.prefix, *sys.path))


def torch_dir() -> Path:
    """The folder where torch is installed, found without importing torch."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        if _is_isolated():
            raise BuildError(
                "this is an isolated build, which sees none of the packages that are installed: "
                "there is no torch. Build with `pip install -v --no-build-isolation .`, in an "
                "environment that has torch, setuptools 77 or later and ninja"
            )
        raise BuildError(
            f"torch cannot be imported by {sys.executable}: install torch there first, "
            "then build with `pip install -v --no-build-isolation .`"
        )
    found = version("torch")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"fusedrnn needs torch >= {oldest}, got {found} in {sys.executable}")
    return Path(spec.submodule_search_locations[0])


def engine_units() -> dict[Path, list[str]]:
    """The files of the CPU engine, csrc/cpu, which does not know torch."""
    isas = isa_flags()
    units: dict[Path, list[str]] = {}
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if not source.stem.startswith("kernels_"):
            units[source] = []
            continue
        isa = source.stem.removeprefix("kernels_")
        if isa in isas:
            units[source] = isas[isa]
        elif isa not in _X86_ISAS:
            raise BuildError(f"{source}: isa_flags() has no flags for {isa!r}")
    return units


def torch_flags() -> list[str]:
    """The flags of sources that include torch's headers."""
    include = torch_dir() / "include"
    return [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        # Warnings in torch's headers are not shown.
        *("-isystem", str(include)),
        f"-ffile-prefix-map={include}/=",
    ]


def torch_units() -> dict[Path, list[str]]:
    """The files of the bindings, csrc/torch, which use torch's stable ABI."""
    return dict.fromkeys(sorted((CSRC / "torch").glob("*.cpp")), torch_flags())


def nvcc() -> str | None:
    """The CUDA compiler in $CUDA_HOME, or else on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def _nvcc_says(compiler: str, *arguments: str) -> str:
    try:
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stdout + done.stderr


def nvcc_version(compiler: str) -> tuple[int, int]:
    """The version of nvcc, (13, 0) for 13.0; raises BuildError if it does not print one."""
    said = _nvcc_says(compiler, "--version")
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise BuildError(f"{compiler} --version names no release: {said!r}")
    return int(found[1]), int(found[2])


def _nvcc_problem() -> str:
    """The reason why the CUDA library cannot be built here, or "" if it can."""
    compiler = nvcc()
    if compiler is None:
        home = os.environ.get("CUDA_HOME")
        return f"nvcc is not in CUDA_HOME={home}" if home else "nvcc is not on PATH"
    try:
        version = nvcc_version(compiler)
    except BuildError as error:
        return str(error)
    if version >= OLDEST_NVCC:
        return ""
    oldest, found = (".".join(map(str, numbers)) for numbers in (OLDEST_NVCC, version))
    return f"the CUDA library needs nvcc {oldest} or later, {compiler} is {found}"


def cuda_choice() -> tuple[bool, str]:
    """Returns whether the CUDA library is built, and why."""
    asked = _switch("FUSEDRNN_CUDA")
    if asked is False:
        return False, "FUSEDRNN_CUDA=0"
    if not asked and not (torch_dir() / "lib" / "libtorch_cuda.so").exists():
        return False, "this torch is no CUDA build; FUSEDRNN_CUDA=1 builds it anyway"
    if not (problem := _nvcc_problem()):
        return True, f"{'FUSEDRNN_CUDA=1' if asked else 'torch has CUDA'}, {nvcc()}"
    if asked:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise BuildError(
            f"FUSEDRNN_CUDA=1, but {problem}: install the CUDA toolkit {oldest} or later, set "
            "CUDA_HOME to it, or unset FUSEDRNN_CUDA"
        )
    return False, f"{problem}; FUSEDRNN_CUDA=1 makes that an error"


def architectures() -> tuple[list[int], int | None]:
    """The architectures of machine code, and that of the PTX, that FUSEDRNN_CUDA_ARCH names."""
    value = os.environ.get("FUSEDRNN_CUDA_ARCH") or RELEASE_ARCHITECTURES
    like = f'FUSEDRNN_CUDA_ARCH must be like "80;90" or "8.0;9.0+PTX", got {value!r}'
    codes: list[int] = []
    ptx = None
    for word in filter(None, re.split(r"[;,\s]+", value)):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", word, re.IGNORECASE)
        if match is None:
            raise BuildError(like)
        code = int(match[1] + match[2])
        if code < OLDEST_ARCHITECTURE:
            raise BuildError(
                f"FUSEDRNN_CUDA_ARCH must be {OLDEST_ARCHITECTURE} or later, got {code}"
            )
        codes.append(code)
        if match[3]:
            if ptx is not None:
                raise BuildError(f"FUSEDRNN_CUDA_ARCH must have +PTX once at most, got {value!r}")
            ptx = code
    if not codes:
        raise BuildError(like)
    return sorted(set(codes)), ptx


def cuda_folders(compiler: str) -> tuple[list[str], list[str]]:
    """The folders of nvcc's headers and libraries, as compiler flags and as linker flags."""
    said = _nvcc_says(compiler, "--dryrun", "-c", "none.cu")
    found = {
        name: shlex.split(text) for name, text in re.findall(r"#\$ (INCLUDES|LIBRARIES)=(.*)", said)
    }
    includes = [word.removeprefix("-I") for word in found.get("INCLUDES", ())]
    if not includes or "LIBRARIES" not in found:
        raise BuildError(f"{compiler} --dryrun does not name its folders:\n{said}")
    return [word for folder in includes for word in ("-isystem", folder)], found["LIBRARIES"]


def nvcc_flags() -> list[str]:
    """The flags of every kernel, without those for the architectures."""
    return [
        *("-std=c++20", "-O3", "-lineinfo"),
        # The cells' constants are constexpr functions, which device code may then call.
        "--expt-relaxed-constexpr",
        # A multiply-add is fused only where the source says so, as on the CPU.
        "-fmad=false",
        *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
        # Registers hold weights for a whole sequence, so a spill would read memory at every step.
        "-Xptxas=-warn-spills",
        *(["-Werror=all-warnings"] if _switch("FUSEDRNN_WERROR") else []),
        f"-I{CSRC}",
    ]


def architecture_flags() -> list[str]:
    """The flags that tell nvcc the architectures of FUSEDRNN_CUDA_ARCH."""
    codes, ptx = architectures()
    targets = [f"arch=compute_{code},code=sm_{code}" for code in codes]
    if ptx is not None:
        targets.append(f"arch=compute_{ptx},code=compute_{ptx}")
    return [word for target in targets for word in ("-gencode", target)]


def compression_flags(version: tuple[int, int]) -> list[str]:
    """The flags with which nvcc of `version` compresses device code.

    Every driver that can run the code of nvcc 13.0 and later can decompress it. Drivers before 550
    can run code of 12.8 and 12.9, but cannot decompress it (nvcc's manual, --compress-mode).
    """
    return ["--compress-mode=size"] if version >= (13, 0) else []


def cuda_units(compiler: str, includes: list[str]) -> dict[Path, list[str]]:
    """The files of the CUDA engine, kernels and bindings: csrc/cuda and csrc/torch_cuda."""
    codes, ptx = architectures()
    compiled = ";".join(f"{code}+PTX" if code == ptx else str(code) for code in codes)
    bindings = [*torch_flags(), *includes, f'-DFUSEDRNN_CUDA_ARCHITECTURES="{compiled}"']
    kernels = [
        *nvcc_flags(),
        *architecture_flags(),
        *compression_flags(nvcc_version(compiler)),
    ]
    units: dict[Path, list[str]] = {}
    for folder, flags in (("cuda", []), ("torch_cuda", bindings)):
        units |= dict.fromkeys(sorted((CSRC / folder).glob("*.cpp")), flags)
        units |= dict.fromkeys(sorted((CSRC / folder).glob("*.cu")), kernels)
    return units


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or else g++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {command[0]!r} is not on PATH; install g++ or set CXX")
    return command


def ninja() -> str:
    """The ninja program, on PATH or from this Python's ninja package."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise BuildError(f"no ninja: install it with `{sys.executable} -m pip install ninja`")
    return found


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or else as many as this process may use CPUs."""
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isdigit() or value == "0":
        raise BuildError(f"MAX_JOBS must be a positive integer, got {value!r}")
    return int(value)


def _escape(text: object) -> str:
    """Writes `text` as a path in a line of a file for ninja."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _variable(words: Iterable[str]) -> str:
    """Writes `words` as a variable of ninja that becomes part of a shell command."""
    return shlex.join(words).replace("$", "$$")


def kept_folder(build_dir: Path, source: Path) -> Path:
    """The folder where FUSEDRNN_CUDA_KEEP keeps a file's PTX, and in said.txt ptxas' figures."""
    return build_dir / source.parent.name / f"{source.stem}.o.kept"


def _kernels_command() -> str:
    """The command of ninja that compiles a file of kernels."""
    command = "$nvcc -ccbin $cxx $own_flags -MMD -MF $out.d -c $in -o $out"
    if not _switch("FUSEDRNN_CUDA_KEEP"):
        return command
    # One command makes the object and what is kept, so both have the same sources and flags. It
    # prints warnings, and everything if it fails, but not the figures.
    command += " -Xptxas=-v --keep --keep-dir $out.kept >$out.kept/said.txt 2>&1"
    end = "&& rm $out.kept/*.ii && { grep -i warning $out.kept/said.txt || true; }"
    failed = "{ cat $out.kept/said.txt; exit 1; }"
    return f"rm -rf $out.kept && mkdir $out.kept && {{ {command} || {failed}; }} {end}"


def _time_needed(sources: Iterable[Path]) -> str:
    """Says how many files are to be compiled, and about how long that takes here."""
    codes, ptx = architectures()
    targets = len(codes) + (ptx is not None)
    seconds = []
    # These seconds were measured on a core of an AMD EPYC, with g++ 12 and nvcc 13.
    for source in sources:
        if source.suffix == ".cu":
            of_kind = {"resident": 30, "clustered": 25, "streamed": 65}
            seconds.append(targets * of_kind.get(source.stem.split("_")[0], 2))
        else:
            seconds.append(20 if source.stem.startswith("kernels_") else 8)
    number = jobs()
    minutes = max(max(seconds), sum(seconds) / number) / 60
    files = "1 file" if len(seconds) == 1 else f"{len(seconds)} files"
    time = f"about {max(1, round(minutes))} min" if minutes > 0.5 else "less than a minute"
    return f"{files}, {number} at a time, {time}"


def _architectures_in_words() -> str:
    """The architectures of FUSEDRNN_CUDA_ARCH, for people."""
    codes, ptx = architectures()
    return ", ".join([f"sm_{code}" for code in codes] + ([f"PTX of {ptx}"] if ptx else []))


def ninja_build(
    build_dir: Path,
    target: str,
    units: Units,
    flags: Iterable[str],
    link_flags: Iterable[str],
    link_inputs: Iterable[Path] = (),
    what: str = "",
) -> Path:
    """Compiles `units` with `flags` and links them into `build_dir / target`, incrementally.

    Args:
        build_dir: the folder for <target>.ninja and for `<folder>/<name>.o` of each source.
        target: the file name of the result.
        units: the sources, each with its own flags; nvcc compiles a .cu file with these alone.
        flags: compiler flags for all C++ sources.
        link_flags: flags that follow the objects in the link command, libraries included.
        link_inputs: other files than objects that cause a new link when they change.
        what: a name for the result; with it, the number of files to compile and the time that this
            takes are printed. "" prints nothing.

    Returns:
        The path of the result, brought up to date.

    Raises:
        BuildError: no compiler, no ninja, no sources, or a command failed.
    """
    if not units:
        raise BuildError(f"{target}: there is no source file to compile under {CSRC}")
    objects = {source: f"{source.parent.name}/{source.stem}.o" for source in units}
    if len(set(objects.values())) != len(objects):
        raise BuildError(f"{target}: two of these sources have one object: {sorted(objects)}")
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {_variable(compiler())}",
        f"nvcc = {_variable([nvcc() or 'nvcc'])}",
        f"flags = {_variable(flags)}",
        "rule compile",
        "  command = $cxx $flags $own_flags -MMD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_kernels",
        f"  command = {_kernels_command()}",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link_flags",
        "  description = link $out",
    ]
    for source, own_flags in units.items():
        rule = "compile_kernels" if source.suffix == ".cu" else "compile"
        lines += [
            f"build {_escape(objects[source])}: {rule} {_escape(source)}",
            f"  own_flags = {_variable(own_flags)}",
        ]
    inputs = " ".join(map(_escape, objects.values()))
    extra = " ".join(map(_escape, link_inputs))
    lines += [
        f"build {_escape(target)}: link {inputs} | {extra}",
        f"  link_flags = {_variable(link_flags)}",
    ]
    # Targets of one folder may have objects in common, but each has its own file for ninja.
    command = [ninja(), "-f", f"{target}.ninja", "-j", str(jobs()), target]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / f"{target}.ninja").write_text("\n".join(lines) + "\n")
    if what:
        planned = subprocess.run([*command, "-n"], cwd=build_dir, capture_output=True).stdout
        lines = planned.decode(errors="replace").splitlines()
        made = {line.split("compile ")[-1] for line in lines if "compile " in line}
        if sources := [source for source, object_file in objects.items() if object_file in made]:
            print(f"fusedrnn: compiling {what}: {_time_needed(sources)}")
    # Flush, so that the lines printed so far come before ninja's own lines.
    sys.stdout.flush()
    if subprocess.run(command, cwd=build_dir).returncode != 0:
        raise BuildError(f"{target} was not built: the compiler's messages stand above")
    return build_dir / target


def library_link_flags() -> list[str]:
    """The linker flags of both libraries."""
    return [
        # They need not export symbols for Python, since their initialisers register the ops.
        *("-shared", f"-Wl,--version-script={EXPORTS}"),
        *("-Wl,--no-undefined", "-Wl,--as-needed", "-pthread"),
        # There is no rpath, because torch is always loaded before these libraries. libstdc++ comes
        # first, because torch also has some of its functions, without their version.
        *(f"-L{torch_dir() / 'lib'}", "-lstdc++", "-ltorch_cpu"),
    ]


def build_library() -> Path:
    """Compiles and links the shared library of the CPU engine and its torch bindings."""
    units = {**engine_units(), **torch_units()}
    made = ", ".join(isa_flags())
    library = ninja_build(
        *(BUILD_DIR, "_C.so", units, common_flags(), library_link_flags(), [EXPORTS]),
        what=f"the library for the CPU ({made})",
    )
    print(f"fusedrnn: built {library.name} for {made}")
    return library


def build_cuda_library() -> Path:
    """Compiles and links the shared library of the CUDA engine, which does not need a GPU."""
    compiler = nvcc()
    assert compiler is not None, "cuda_choice() says whether there is one"
    includes, libraries = cuda_folders(compiler)
    made = _architectures_in_words()
    library = ninja_build(
        CUDA_BUILD_DIR,
        "_cuda.so",
        cuda_units(compiler, includes),
        common_flags(),
        [
            *library_link_flags(),
            # The CUDA runtime is linked in, because torch's runtime may have another version.
            *(*libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"),
            "-Wl,--exclude-libs,ALL",
        ],
        [EXPORTS],
        f"the library for GPUs ({made}; FUSEDRNN_CUDA=0 leaves it out)",
    )
    print(f"fusedrnn: built {library.name} for {made}")
    return library
