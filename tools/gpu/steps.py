"""The steps of a run, in order: what is there, whether it is right, how fast it is, and why."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .facts import ROOT
from .results import lines, numbers_are_wrong
from .run import Run, python
from .tasks import REGIME

# The groups of steps, as --steps names them.
GROUPS = ("checks", "bench", "profile", "ncu", "sanitizer", "pytest")
# Seconds that the checks leave to what is measured, and that the timings leave to the profiles.
FOR_TIMES = 150.0
FOR_PROFILES = 25.0
# What a closer look leaves to them: some rows, rather than none.
FOR_SOME_TIMES = 90.0

IMPORT = """
import sys, time
begin = time.perf_counter()
import torch
loaded = time.perf_counter()
import fusedrnn
from fusedrnn._library import CUDA
print(f"torch in {loaded - begin:.1f} s, fusedrnn in {time.perf_counter() - loaded:.1f} s")
fusedrnn.show_config()
assert sys.argv[1] != "cuda" or CUDA.path, CUDA.missing
"""
# How long the first calls of a process take: the library loads its kernels then.
FIRST_CALLS = """
import os, sys, time
import torch, fusedrnn
device = sys.argv[1]
begin = time.perf_counter()
x = torch.ones(3, 2, 4, device=device)
layer = fusedrnn.FusedLSTM(4, 5, device=device)
print(f"a tensor and a layer there in {time.perf_counter() - begin:.2f} s")
for regime in ("per_step", "resident"):
    os.environ["FUSEDRNN_CUDA_REGIME"] = regime
    for which in ("first", "second"):
        begin = time.perf_counter()
        layer(x)[0].sum().item()
        print(f"{regime}: the {which} call in {(time.perf_counter() - begin) * 1e3:.1f} ms")
"""
BUILD = """
import os, shutil, sys
import setup_build
library, cuda = setup_build.build_library(), setup_build.build_cuda_library()
for made in (library, cuda):
    shutil.copy(made, os.path.join("fusedrnn", made.name))
    print(f"built fusedrnn/{made.name}")
"""
# Profiled: where the resident and the per-step regime spend their time.
PROFILED = (("lstm", "bf16", "150,32,1024,1024"), ("lstm", "bf16", "25,32,2048,2048"))
# Looked at by ncu: the resident kernels, on tensor cores and on the ordinary ones.
COUNTED = (("bf16", "30,32,1024,1024"), ("f32", "100,1,256,256"))
SANITIZED = ("memcheck", "racecheck", "synccheck", "initcheck")
DEVICE_TESTS = "cuda and (256 or test_cells or gradcheck or compile)"
# The names of the timings' step, and of those that go on behind rows that took a process with them.
BENCHES = (
    "times beside torch.nn",
    "times, behind the row that was lost",
    "times, per step alone",
)
# How the programs that time rows or do tasks end where time ran out.
LATE = ("exit 3", "out of time")
# What NVIDIA's tools say on a machine that does not let them look at the GPU.
CANNOT = (
    *("LibraryNotLoaded", "ERR_NVGPUCTRPERM", "Device not supported", "not supported on this"),
    "Failed to initialize the profiler",
)


class Everything:
    """All steps on one device.

    Args:
        run: where they run and what came of them is kept.
        device: "cuda", or "cpu" for a dry run.
        quick: small sizes, few rows.
        tasks: groups of checks in place of all.
        rows: a text that timed rows must have in their names.
    """

    def __init__(self, run: Run, device: str, quick: bool, tasks: str = "", rows: str = "") -> None:
        self.run = run
        self.device = device
        self.quick = ["--quick"] if quick else []
        self.tasks = tasks
        self.rows = rows
        self.useless: set[str] = set()  # tools that do not work on this machine

    @property
    def wrong(self) -> bool:
        """Whether numbers are wrong, or something hung or died, as far as is known."""
        return numbers_are_wrong(lines(self.run.folder / "checks.jsonl"))

    def do(self) -> None:
        """Runs all steps that were asked for."""
        self.facts()
        if not self.library():
            self.run.say("nothing can run here")
            return
        # Whatever comes of them: the checks find out more.
        first = [sys.executable, "-c", FIRST_CALLS, self.device]
        self.run.step("first calls", 60, first, FOR_TIMES)
        if self.run.wants("checks"):
            self.checks()
        if self.wrong and self.device == "cuda":
            self.look_closer()
        if self.run.wants("bench"):
            self.bench()
        if self.run.wants("profile"):
            self.profile()
        if self.run.wants("ncu"):
            for precision, shape in COUNTED:
                self.counters(precision, shape)
        if self.run.wants("sanitizer"):
            for tool in SANITIZED:
                self.sanitize(tool, "bf16", "4,9,6,17", "--lengths")
        if self.run.wants("pytest"):
            self.pytest()
        if not self.run.facts:  # they were cut off, and say which card this is
            self.facts()

    # --- What is there --------------------------------------------------------------------------

    def facts(self) -> None:
        """The machine and its software."""
        outcome = self.run.step("facts", 60, python("tools.gpu.facts"), lines=0)
        text = "\n".join(outcome.out.text) if outcome and outcome.ok else ""
        try:
            # Something else may have been printed before.
            self.run.facts = json.loads(text[text.index("{\n") :])
        except ValueError:
            self.run.say("   no facts: see log.txt")
            return
        self.run.save()
        for name in ("nvidia_smi", "gpu", "torch", "programs"):
            self.run.say(f"   {name}: {json.dumps(self.run.facts.get(name))}")

    def library(self) -> bool:
        """Imports the library; builds it where it is not there or does not load."""
        if self.device == "cuda" and self.run.facts.get("torch", {}).get("gpus") == 0:
            why = "torch finds no GPU; see whether nvidia-smi does"
            self.run.not_run("import", why, "failed")
            return False
        command = [sys.executable, "-c", IMPORT, self.device]
        outcome = self.run.step("import", 90, command, lines=16)
        if outcome and outcome.ok:
            return True
        capability = str(self.run.facts.get("gpu", {}).get("capability", "")).replace(".", "")
        build = self.run.step(
            "build",
            240,
            [sys.executable, "-c", BUILD],
            keep=60,
            env={"FUSEDRNN_CUDA": "1", "FUSEDRNN_CUDA_ARCH": capability or "90"},
        )
        if not build or not build.ok:
            return False
        again = self.run.step("import, as built here", 90, command, lines=16)
        return bool(again and again.ok)

    # --- Right or wrong -------------------------------------------------------------------------

    def check(self, name: str, tasks: str, limit: float, keep: float = 0.0, **env: str) -> None:
        """A step of checks."""
        seconds = self.run.clock.grant(limit, keep)
        # The supervisor stops by itself, a little before it is stopped.
        arguments = ["--device", self.device, "--out", str(self.run.folder / "checks.jsonl")]
        arguments += ["--tasks", tasks, "--seconds", f"{max(seconds - 4, 1):.0f}", *self.quick]
        command = python("tools.gpu.check", *arguments)
        self.run.step(name, limit, command, keep, 90, env, unfinished=LATE)

    def checks(self) -> None:
        """The smallest layers first, then everything."""
        if self.tasks:
            keep = FOR_TIMES if self.run.wants("bench") else 0.0
            self.check("checks", self.tasks, self.run.clock.seconds, keep)
            return
        self.check("smallest layers", "limits,smoke", 100, FOR_TIMES)
        self.check("all layers", "parity,sections,surroundings,stress,large", 220, FOR_TIMES)

    def look_closer(self) -> None:
        """Where something is wrong: each launch waited for, with its plan in the log; memcheck."""
        logged = {"CUDA_LAUNCH_BLOCKING": "1", "FUSEDRNN_LOG": "1"}
        name = "smallest layers, each launch waited for"
        self.check(name, "smoke", 60, FOR_SOME_TIMES, **logged)
        self.sanitize("memcheck", "bf16", "4,9,6,17", keep=FOR_SOME_TIMES)
        self.sanitize("memcheck", "f32", "4,3,6,17", keep=FOR_SOME_TIMES)

    # --- Fast or slow ---------------------------------------------------------------------------

    def bench(self) -> None:
        """Rows beside torch.nn. A row that takes the process with it costs itself alone.

        After a second one the rest is timed without the resident kernels.
        """
        out = self.run.folder / "bench.jsonl"
        for number, name in enumerate(BENCHES):
            seconds = self.run.clock.grant(115, FOR_PROFILES)
            begun = sum(line["kind"] == "begin" for line in lines(out))
            arguments = ["--device", self.device, "--out", str(out), "--skip", str(begun)]
            arguments += ["--seconds", f"{max(seconds - 8, 1):.0f}", "--rows", self.rows]
            arguments += ["--most", "4"] if self.quick else []
            env = {REGIME: "per_step"} if number == len(BENCHES) - 1 else {}
            command = python("tools.gpu.bench", *arguments)
            done = self.run.step(name, 115, command, FOR_PROFILES, 100, env, unfinished=LATE)
            if done is None or done.code in (0, 1, 2, 3):
                return

    def profile(self) -> None:
        """Where a call's time goes, by torch's profiler."""
        shapes = (("lstm", "f32", "9,3,8,16"),) if self.quick else PROFILED
        for cell, precision, shape in shapes:
            arguments = ["--device", self.device, "--cell", cell, "--precision", precision]
            command = python("tools.gpu.one", *arguments, "--shape", shape, "--profile")
            name = f"profile {cell} {precision} {shape}"
            self.run.step(name, 40, command, lines=22, into="profile.txt")

    def counters(self, precision: str, shape: str) -> None:
        """What ncu counts in the resident kernels of a second call, forward and backward."""
        name = f"ncu {precision} {shape}"
        if not self.has_tool(name, "ncu"):
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.ncu-rep"
            one = python("tools.gpu.one", "--device", self.device, "--calls", "2")
            command = ["ncu", "--clock-control", "none", "-k", "regex:resident"]
            command += ["--launch-skip", "2", "--launch-count", "2", "--set", "full"]
            command += ["-o", str(report.with_suffix("")), *one]
            command += ["--precision", precision, "--shape", shape]
            self.tool_step("ncu", name, 60, command, lines=0)
            if not report.exists():
                return
            pages = ["ncu", "--import", str(report), "--page", "details"]
            found = self.run.step(f"{name}, details", 20, pages, lines=0, into="profile.txt")
            for line in _telling(found.out.text if found else []):
                self.run.say(f"   {line}")
            hot = python("tools.gpu.hot", str(report))
            self.run.step(f"{name}, source", 25, hot, lines=0, into="profile.txt")

    def has_tool(self, step: str, tool: str) -> bool:
        """Whether one of NVIDIA's tools is there and works; else the step is told as not run."""
        if tool in self.useless:
            self.run.not_run(step, f"{tool} does not work on this machine")
            return False
        return self.run.has_tool(step, tool)

    def tool_step(self, tool: str, *arguments: Any, **named: Any) -> None:
        """A step with such a tool. One that cannot look at this GPU is not tried again."""
        begun = self.run.step(*arguments, **named, cannot=CANNOT)
        if begun and self.run.steps[-1].result == "not run":
            self.useless.add(tool)

    def sanitize(
        self, tool: str, precision: str, shape: str, *arguments: str, keep: float = 0.0
    ) -> None:
        """NVIDIA's judge on one small layer; racecheck sees shared memory only."""
        name = f"sanitizer {tool} {precision} {shape}"
        if not self.has_tool(name, "compute-sanitizer"):
            return
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=resident"]
        command += ["--print-limit", "20", "--error-exitcode", "99"]
        command += python("tools.gpu.one", "--device", self.device, "--calls", "1")
        command += ["--precision", precision, "--shape", shape, *arguments]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that it sees each tensor's own bounds
        self.tool_step(
            "compute-sanitizer", name, 45, command, keep, lines=4, env=env, into="sanitizer.txt"
        )

    def pytest(self) -> None:
        """The project's own tests of a device, as far as there is time."""
        for module in ("pytest", "hypothesis"):
            if find_spec(module) is None:
                self.run.not_run("pytest", f"{module} is not installed")
                return
        chosen = DEVICE_TESTS if self.device == "cuda" else "test_cells"
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT)]
        command += ["-q", "-p", "no:cacheprovider", "--maxfail=15", "-k", chosen]
        tests = str(Path("tests") / "layers" / "test_devices.py")
        self.run.step("pytest", 120, [*command, tests], 2, 8, unfinished=("out of time",))


# Of ncu's details, the lines that say how a kernel spends its time.
TELLING = (
    *("resident_", "Duration", "Compute (SM) Throughput", "Memory Throughput", "L2 Cache Through"),
    *("Registers Per Thread", "Local Load", "Local Store", "No Eligible", "Executed Ipc Active"),
    *("Theoretical Occupancy", "Achieved Occupancy", "Stall"),
)


def _telling(text: list[str]) -> list[str]:
    return [line.strip()[:120] for line in text if any(word in line for word in TELLING)][:24]
