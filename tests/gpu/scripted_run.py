"""A run of tools.gpu that starts no process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.gpu import steps
from tools.gpu.process import Outcome, Stream
from tools.gpu.run import Clock, Run, Step


class Script(Run):
    """A run that starts no process: `takes` says how many seconds each step takes.

    A key of `takes` is the beginning of a step's name.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        takes: dict[str, float],
        codes: dict[str, int] | None = None,
    ) -> None:
        super().__init__(folder, seconds, {})
        self.now = 0.0
        self.clock = Clock(seconds, lambda: self.now)
        self.takes = takes
        self.codes = codes or {}
        self.commands: dict[str, tuple[float, str, dict[str, str]]] = {}

    def has_tool(self, step: str, program: str) -> bool:
        return True

    def step(  # type: ignore[override]
        self,
        name: str,
        limit: float,
        command: Any,
        keep: float = 0.0,
        lines: int = 12,
        env: Any = None,
        **_: Any,
    ) -> Outcome | None:
        seconds = self.clock.grant(limit, keep)
        if not seconds:
            self.not_run(name, "no time")
            return None
        # A step that `takes` does not name uses up all the seconds that it was granted.
        takes = [t for start, t in self.takes.items() if name.startswith(start)]
        self.now += min([seconds, *takes])
        self.commands[name] = (seconds, " ".join(command), dict(env or {}))
        code = self.codes.get(name, 0)
        out = Stream()
        for line in ("a library's word", "{", '"gpu": {"capability": "9.0"}', "}"):
            out.add(line)
        why = f"exit {code}" if code else ""
        self.steps.append(Step(name, "failed" if code else "ok", why, 1.0, seconds, []))
        return Outcome(code, why, 1.0, out, Stream())


def everything(run: Script, tasks: str = "", rows: str = "") -> list[str]:
    steps.Everything(run, "cuda", quick=False, tasks=tasks, rows=rows).do()
    return list(run.commands)


USUAL = {
    "facts": 8,
    "import": 10,
    "first calls": 8,
    "smallest": 25,
    "all layers": 140,
    "times": 110,
    "profile": 12,
}
