"""The steps of a run, in order: the machine, the checks, the times, and the profiles."""

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

# The names of the groups of steps for --steps.
GROUPS = ("checks", "bench", "sweep", "profile", "ncu", "sanitizer", "pytest")
# The seconds that the checks leave to the timings, and that the timings leave to the profiles.
FOR_TIMES = 150.0
FOR_PROFILES = 25.0
# The seconds that the sweep over other plans gets at least, and its part of what is left.
FOR_SWEEP = 45.0
PART_FOR_SWEEP = 0.5
# The seconds that a closer look leaves to the timings, so that at least some rows are timed.
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
# Prints how long the first calls of a process take, in which the library loads its kernels.
FIRST_CALLS = """
import os, sys, time
import torch, fusedrnn
device = sys.argv[1]
begin = time.perf_counter()
x = torch.ones(3, 2, 4, device=device)
layer = fusedrnn.FusedLSTM(4, 5, device=device)
print(f"a tensor and a layer there in {time.perf_counter() - begin:.2f} s")
for regime in ("per_step", "resident", "streamed"):
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
# The layers to profile. Of an H100, the first is resident; of the second, forward is streamed and
# backward runs per step.
PROFILED = (("lstm", "bf16", "150,32,1024,1024"), ("lstm", "bf16", "25,32,2048,2048"))
# The layers for ncu, and the regime to ask for, if any: kernels that use tensor cores, and that use
# ordinary cores, resident where that fits; and streamed kernels whose weights come from L2.
COUNTED = (
    ("bf16", "30,32,1024,1024", ""),
    ("f32", "100,1,256,256", ""),
    ("bf16", "30,32,2048,2048", "streamed"),
)
# The regimes whose kernels run a time loop.
LOOPS = ("resident", "streamed")
SANITIZED = ("memcheck", "racecheck", "synccheck", "initcheck")
DEVICE_TESTS = "cuda and (256 or test_cells or gradcheck or compile)"
# The names of the step that times rows, and of the steps that continue after a process was lost.
BENCHES = (
    "times beside torch.nn",
    "times, behind the row that was lost",
    "times, per step alone",
)
SWEEPS = ("other plans", "other plans, behind the row that was lost")
# How the programs that time rows or run tasks end if time ran out.
LATE = ("exit 3", "out of time")
# Messages of NVIDIA's tools on a machine that does not let them use the GPU.
CANNOT = (
    *("LibraryNotLoaded", "ERR_NVGPUCTRPERM", "Device not supported", "not supported on this"),
    "Failed to initialize the profiler",
)


class Everything:
    """All steps on one device.

    Args:
        run: runs the steps and keeps their results.
        device: "cuda", or "cpu" for a dry run.
        quick: whether to take only small sizes and few rows.
        tasks: the groups of checks to run, or "" for all.
        rows: a text that the names of timed rows must contain.
    """

    def __init__(self, run: Run, device: str, quick: bool, tasks: str = "", rows: str = "") -> None:
        self.run = run
        self.device = device
        self.quick = ["--quick"] if quick else []
        self.tasks = tasks
        self.rows = rows
        self.useless: set[str] = set()  # the tools that do not work on this machine

    @property
    def wrong(self) -> bool:
        """Whether a check so far found wrong numbers, or a task hung or died."""
        return numbers_are_wrong(lines(self.run.folder / "checks.jsonl"))

    def do(self) -> None:
        """Runs all steps that the options include."""
        self.facts()
        if not self.library():
            self.run.say("nothing can run here")
            return
        # A failure here is ignored, because the checks say more.
        first = [sys.executable, "-c", FIRST_CALLS, self.device]
        self.run.step("first calls", 60, first, FOR_TIMES)
        if self.run.wants("checks"):
            self.checks()
        if self.wrong and self.device == "cuda":
            self.look_closer()
        if self.run.wants("bench"):
            self.bench()
        if self.run.wants("sweep"):
            self.sweep()
        if self.run.wants("profile"):
            self.profile()
        if self.run.wants("ncu"):
            for precision, shape, regime in COUNTED:
                self.counters(precision, shape, regime)
        if self.run.wants("sanitizer"):
            for tool in SANITIZED:
                for regime in LOOPS:
                    self.sanitize(tool, "bf16", "4,9,6,17", regime, "--lengths")
        if self.run.wants("pytest"):
            self.pytest()
        if not self.run.facts:  # try again, because the report needs the card's name
            self.facts()

    # --- What is there --------------------------------------------------------------------------

    def facts(self) -> None:
        """Finds out what the machine and its software are."""
        outcome = self.run.step("facts", 60, python("tools.gpu.facts"), lines=0)
        text = "\n".join(outcome.out.text) if outcome and outcome.ok else ""
        try:
            # Other text may come before the JSON.
            self.run.facts = json.loads(text[text.index("{\n") :])
        except ValueError:
            self.run.say("   no facts: see log.txt")
            return
        self.run.save()
        for name in ("nvidia_smi", "gpu", "torch", "programs"):
            self.run.say(f"   {name}: {json.dumps(self.run.facts.get(name))}")

    def library(self) -> bool:
        """Imports the library, and builds it if it is missing or does not load."""
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
        """Runs a step of checks."""
        seconds = self.run.clock.grant(limit, keep)
        # The supervisor stops by itself a little before the step's limit.
        arguments = ["--device", self.device, "--out", str(self.run.folder / "checks.jsonl")]
        arguments += ["--tasks", tasks, "--seconds", f"{max(seconds - 4, 1):.0f}", *self.quick]
        command = python("tools.gpu.check", *arguments)
        self.run.step(name, limit, command, keep, 90, env, unfinished=LATE)

    def checks(self) -> None:
        """Checks the smallest layers first, then everything."""
        if self.tasks:
            keep = FOR_TIMES if self.run.wants("bench") else 0.0
            self.check("checks", self.tasks, self.run.clock.seconds, keep)
            return
        self.check("smallest layers", "limits,smoke", 100, FOR_TIMES)
        self.check("all layers", "parity,sections,surroundings,stress,large", 220, FOR_TIMES)

    def look_closer(self) -> None:
        """Repeats checks with a wait after each launch and its plan in the log; runs memcheck."""
        logged = {"CUDA_LAUNCH_BLOCKING": "1", "FUSEDRNN_LOG": "1"}
        name = "smallest layers, each launch waited for"
        self.check(name, "smoke", 60, FOR_SOME_TIMES, **logged)
        for precision, shape in (("bf16", "4,9,6,17"), ("f32", "4,3,6,17")):
            for regime in LOOPS:
                self.sanitize("memcheck", precision, shape, regime, keep=FOR_SOME_TIMES)

    # --- Fast or slow ---------------------------------------------------------------------------

    def bench(self) -> None:
        """Times rows beside torch.nn. If a row ends the process, only that row is lost.

        After a second such row, the remaining rows are timed without kernels that run a time loop.
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

    def sweep(self) -> None:
        """Times other plans of the rows than those that are chosen, the first rows first.

        If a plan ends the process, another one continues with the next row.
        """
        out = self.run.folder / "bench.jsonl"
        later = any(map(self.run.wants, GROUPS[GROUPS.index("sweep") + 1 :]))
        keep = FOR_PROFILES if later else 0.0
        for name in SWEEPS:
            left = self.run.clock.left()
            limit = max(FOR_SWEEP, PART_FOR_SWEEP * left) if later else left
            seconds = self.run.clock.grant(limit, keep)
            begun = sum(line["kind"] == "sweep begin" for line in lines(out))
            arguments = ["--device", self.device, "--out", str(out), "--skip", str(begun)]
            arguments += ["--seconds", f"{max(seconds - 8, 1):.0f}", "--rows", self.rows]
            arguments += ["--most", "2"] if self.quick else []
            command = python("tools.gpu.sweep", *arguments)
            done = self.run.step(name, limit, command, keep, 100, unfinished=LATE)
            if done is None or done.code in (0, 1, 2, 3):
                return

    def profile(self) -> None:
        """Finds out with torch's profiler where a call spends its time."""
        shapes = (("lstm", "f32", "9,3,8,16"),) if self.quick else PROFILED
        for cell, precision, shape in shapes:
            arguments = ["--device", self.device, "--cell", cell, "--precision", precision]
            command = python("tools.gpu.one", *arguments, "--shape", shape, "--profile")
            name = f"profile {cell} {precision} {shape}"
            self.run.step(name, 40, command, lines=22, into="profile.txt")

    def counters(self, precision: str, shape: str, regime: str) -> None:
        """Lets ncu count in the kernels of a second call, forward and backward."""
        name = f"ncu {precision} {shape} {regime}".rstrip()
        if not self.has_tool(name, "ncu"):
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.ncu-rep"
            one = python("tools.gpu.one", "--device", self.device, "--calls", "2")
            command = ["ncu", "--clock-control", "none", "-k", f"regex:{'|'.join(LOOPS)}"]
            command += ["--launch-skip", "2", "--launch-count", "2", "--set", "full"]
            command += ["-o", str(report.with_suffix("")), *one]
            command += ["--precision", precision, "--shape", shape]
            self.tool_step(
                "ncu", name, 60, command, lines=0, env={REGIME: regime} if regime else {}
            )
            if not report.exists():
                return
            pages = ["ncu", "--import", str(report), "--page", "details"]
            found = self.run.step(f"{name}, details", 20, pages, lines=0, into="profile.txt")
            for line in _telling(found.out.text if found else []):
                self.run.say(f"   {line}")
            hot = python("tools.gpu.hot", str(report))
            self.run.step(f"{name}, source", 25, hot, lines=0, into="profile.txt")

    def has_tool(self, step: str, tool: str) -> bool:
        """Whether one of NVIDIA's tools works here; if not, the step is recorded as not run."""
        if tool in self.useless:
            self.run.not_run(step, f"{tool} does not work on this machine")
            return False
        return self.run.has_tool(step, tool)

    def tool_step(self, tool: str, *arguments: Any, **named: Any) -> None:
        """Runs a step with such a tool. If it cannot use this GPU, it is not tried again."""
        begun = self.run.step(*arguments, **named, cannot=CANNOT)
        if begun and self.run.steps[-1].result == "not run":
            self.useless.add(tool)

    def sanitize(
        self,
        tool: str,
        precision: str,
        shape: str,
        regime: str,
        *arguments: str,
        keep: float = 0.0,
    ) -> None:
        """Runs compute-sanitizer on a small layer; its racecheck sees only shared memory."""
        name = f"sanitizer {tool} {precision} {shape} {regime}"
        if not self.has_tool(name, "compute-sanitizer"):
            return
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", f"kns={regime}"]
        command += ["--print-limit", "20", "--error-exitcode", "99"]
        command += python("tools.gpu.one", "--device", self.device, "--calls", "1")
        command += ["--precision", precision, "--shape", shape, *arguments]
        # Without its cache torch gives each tensor its own memory, whose bounds memcheck sees.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", REGIME: regime}
        self.tool_step(
            "compute-sanitizer", name, 45, command, keep, lines=4, env=env, into="sanitizer.txt"
        )

    def pytest(self) -> None:
        """Runs the project's own tests of a device, as far as there is time."""
        for module in ("pytest", "hypothesis"):
            if find_spec(module) is None:
                self.run.not_run("pytest", f"{module} is not installed")
                return
        chosen = DEVICE_TESTS if self.device == "cuda" else "test_cells"
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT)]
        command += ["-q", "-p", "no:cacheprovider", "--maxfail=15", "-k", chosen]
        tests = str(Path("tests") / "layers" / "test_devices.py")
        self.run.step("pytest", 120, [*command, tests], 2, 8, unfinished=("out of time",))


# The lines of ncu's details that say how a kernel spends its time contain one of these.
TELLING = (
    *("resident_", "streamed_", "Duration", "Compute (SM) Throughput", "Memory Throughput"),
    "L2 Cache Through",
    *("Registers Per Thread", "Local Load", "Local Store", "No Eligible", "Executed Ipc Active"),
    *("Theoretical Occupancy", "Achieved Occupancy", "Stall"),
)


def _telling(text: list[str]) -> list[str]:
    return [line.strip()[:120] for line in text if any(word in line for word in TELLING)][:24]
