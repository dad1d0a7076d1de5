"""Every instruction set, forced in its own process, and how the library chooses and reports one."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _reference
from fusedrnn._library import CELLS, LIBRARY
from tests.kit.build import native
from tests.kit.isa_results import BATCHES, run
from tests.kit.layers import error

ROOT = Path(__file__).resolve().parents[2]
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]
THREADS = 1  # OMP_NUM_THREADS of the processes that the tests start


def python(
    *arguments: str, isa: str | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDRNN_ISA"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
    if isa is not None:
        environment["FUSEDRNN_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@functools.cache
def results(isa: str, folder: Path) -> dict:
    path = folder / f"{isa}.pt"
    done = python("-m", "tests.kit.isa_results", str(path), isa=isa)
    assert done.returncode == 0, done.stderr
    saved = torch.load(path)
    assert saved["isa"] == isa
    return saved["results"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isa")


@functools.cache
def expected(cell: str, batch: str) -> list[Tensor]:
    return run(_reference.layer, cell, batch, torch.float64)


# --- Results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
def test_each_meets_the_float64_reference(isa: str, cell: str, folder: Path) -> None:
    if not LIBRARY.compiled[isa]:
        pytest.skip(f"this processor has no {isa}")
    # The inputs are exact in float16 and bfloat16, and sums are in float32. Roundings to 16 bits
    # happen in the outputs and in the terms of the loss, and in h where pairs of bfloat16 are
    # multiplied.
    limits = {
        torch.float64: 1e-14,
        torch.float32: 2e-6,
        torch.float16: 2e-3,
        torch.bfloat16: 1.6e-2,
    }
    for batch in BATCHES:
        wanted = expected(cell, batch)
        for dtype, limit in limits.items():
            got = results(isa, folder)[cell, batch, dtype]
            assert len(got) == len(wanted)
            for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
                assert g.dtype == dtype
                assert error(g, w) <= limit, (k, batch, dtype)


def test_all_agree(folder: Path) -> None:
    here = [isa for isa in ISAS if LIBRARY.compiled[isa]]
    first = results(here[0], folder)
    for isa in here[1:]:
        for key, wanted in first.items():
            limit = {torch.float64: 1e-14, torch.float32: 2e-6}.get(key[2], 1.6e-2)
            for g, w in zip(results(isa, folder)[key], wanted, strict=True):
                assert error(g, w) <= limit, (isa, key)


def test_fma_shows_that_other_code_ran(folder: Path) -> None:
    """Portable code rounds products before it adds them, so its bits must differ from FMA's."""
    if not LIBRARY.compiled["avx2"]:
        pytest.skip("this processor has no avx2")
    key = ("lstm", "plain", torch.float32)
    pairs = zip(results("portable", folder)[key], results("avx2", folder)[key], strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


# --- The choice ----------------------------------------------------------------------------------


def test_the_best_is_chosen() -> None:
    best = next(isa for isa in reversed(ISAS) if LIBRARY.compiled[isa])
    script = "from fusedrnn._library import LIBRARY; print(LIBRARY.isa)"
    for nothing in (None, ""):
        done = python("-c", script, isa=nothing)
        assert done.stdout == best + "\n", done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512 "])
def test_an_unknown_name_is_an_error_at_import(name: str) -> None:
    done = python("-c", "import fusedrnn", isa=name)
    assert done.returncode != 0
    choices = ", ".join(isa for isa in reversed(ISAS) if LIBRARY.compiled[isa])
    last_line = done.stderr.strip().splitlines()[-1]
    assert f"FUSEDRNN_ISA must be one of {choices}, got '{name}'" in last_line, done.stderr


def test_on_a_processor_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the library's own choice for a processor that has no AVX-512."""
    monkeypatch.delenv("FUSEDRNN_ISA", raising=False)
    named = native().old_processor_kernels_named
    assert named("") == "avx2"
    assert named("avx2") == "avx2"
    assert named("portable") == "portable"
    with pytest.raises(
        RuntimeError,
        match=r"^FUSEDRNN_ISA must be one of avx2, portable, got 'avx512': this processor lacks "
        r"one of avx512f avx512bw avx512dq avx512vl$",
    ):
        named("avx512")
    with pytest.raises(RuntimeError, match=r"lacks one of avx512f .* avx512_bf16$"):
        named("avx512_bf16")
    with pytest.raises(RuntimeError, match=r"must be one of avx2, portable, got 'x'$"):
        named("x")
    monkeypatch.setenv("FUSEDRNN_ISA", "portable")
    assert named("") == "portable"
    monkeypatch.setenv("FUSEDRNN_ISA", "avx512")
    with pytest.raises(RuntimeError, match="this processor lacks one of avx512f"):
        named("")


def test_all_are_compiled() -> None:
    assert list(LIBRARY.compiled) == list(reversed(ISAS))
    assert LIBRARY.compiled["portable"]
    flags = set(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    assert LIBRARY.compiled["avx2"] == ({"avx2", "fma"} <= flags)
    needed = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert LIBRARY.compiled["avx512"] == (needed <= flags)
    assert LIBRARY.compiled["avx512_bf16"] == (needed | {"avx512_bf16"} <= flags)


# --- What fusedrnn.show_config prints ------------------------------------------------------------


def check_config(text: str, isa: str, threads: int, forced: bool) -> None:
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in text.strip().splitlines())
    assert facts["fusedrnn"] == fusedrnn.__version__
    assert facts["torch"].split()[0] == torch.__version__
    for name in ISAS:
        assert name in facts["instruction sets compiled"]
    assert facts["instruction set chosen"].split()[0] == isa
    assert ("FUSEDRNN_ISA" in facts["instruction set chosen"]) == forced
    assert int(facts["threads"].split()[0]) == threads
    # A torch without CUDA never loads the CUDA library.
    loaded = r"sm_\d+.*, CUDA runtime \d|" if torch.version.cuda else ""
    assert re.match(f"{loaded}not loaded: .", facts["CUDA library"])


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fusedrnn.show_config()
    forced = bool(os.environ.get("FUSEDRNN_ISA"))
    check_config(capsys.readouterr().out, LIBRARY.isa, torch.get_num_threads(), forced)


def test_python_m_fusedrnn(tmp_path: Path) -> None:
    done = python("-m", "fusedrnn", isa="portable", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_config(done.stdout, "portable", THREADS, True)
