"""Which folder of csrc may include which, and how many arguments a function may take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from setup_build import CSRC

SOURCES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh")
)
# The folders that the files of a folder may include. An engine includes neither the other engine
# nor the bindings. Code that both engines share is in layer.
MAY_INCLUDE = {
    "cells": {"cells"},
    "layer": {"layer", "cells"},
    "cpu": {"cpu", "layer", "cells"},
    "cuda": {"cuda", "layer", "cells"},
    "torch": {"torch", "layer", "cells"},
    "torch_cuda": {"torch_cuda", "torch", "cuda", "layer", "cells"},
}
# The files of csrc/torch that know an engine. The others serve the bindings on any device.
KNOW_AN_ENGINE = {
    "torch/cpu_engine.h": "cpu",
    "torch/runtime.h": "cpu",
    "torch/cuda_plan.cpp": "cuda",
}
# The operations may take more arguments: torch passes all arguments of a schema by position.
OPERATIONS = {"torch/passes.h": {"forward", "backward", "step", "step_backward"}}
OPERATIONS["torch/cuda_plan.cpp"] = {"plan"}


def includes(path: Path) -> Iterator[Path]:
    """The files of csrc that a file includes."""
    for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
        target = (path.parent / name).resolve()
        assert target.is_file(), f"{path}: {name}"
        yield target


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_down(path: Path) -> None:
    folder = path.parent.name
    where = str(path.relative_to(CSRC))
    allowed = MAY_INCLUDE[folder] | {KNOW_AN_ENGINE.get(where, folder)}
    found = {target.parent.name for target in includes(path)}
    assert found <= allowed, f"{where} includes {sorted(found - allowed)}"
    if folder == "cpu" and path.name != "layer.cpp":
        upward = [target.name for target in includes(path) if target == CSRC / "cpu" / "layer.h"]
        assert not upward, "layer.h is the top of the CPU engine"


def circle(graph: dict[Path, list[Path]]) -> list[str]:
    """The names of files that include each other in a circle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [path.name for path in error.args[1]]
    return []


def test_no_includes_form_a_circle() -> None:
    graph = {path: list(includes(path)) for path in SOURCES}
    assert sum(map(len, graph.values())) > 100
    assert circle(graph) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, included in (("a.h", "b.h"), ("b.h", "c.h"), ("c.h", "a.h"), ("top.h", "a.h")):
        (tmp_path / name).write_text(f'#pragma once\n#include "{included}"\n')
    graph = {path: list(includes(path)) for path in tmp_path.iterdir()}
    assert set(circle(graph)) == {"a.h", "b.h", "c.h"}


# Names with which the headers of torch begin.
TORCH = ("torch", "ATen", "c10")


@pytest.mark.parametrize("folder", ["cells", "layer", "cpu", "cuda"])
def test_floors_below_the_bindings_know_no_torch_and_no_cuda(folder: str) -> None:
    """The files of kernels on a GPU may include CUDA; their host side goes through a launcher."""
    for path in SOURCES:
        if path.parent.name == folder:
            device = path.suffix in (".cu", ".cuh")
            unknown = "|".join(TORCH if device else (*TORCH, "cuda"))
            assert not re.search(rf"^#include <({unknown})", path.read_text(), re.M), path


def functions(text: str) -> Iterator[tuple[str, int]]:
    """The name and the number of parameters of each function that a file defines."""
    text = re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|^#[^\n]*(?:\\\n[^\n]*)*', "", text, flags=re.M)
    for match in re.finditer(r"([A-Za-z_]\w*)\s*\(", text):
        name, at, depth, commas = match[1], match.end(), 1, 0
        while depth and at < len(text):
            depth += {"(": 1, "<": 1, "{": 1, "[": 1, ")": -1, ">": -1, "}": -1, "]": -1}.get(
                text[at], 0
            )
            commas += text[at] == "," and depth == 1
            at += 1
        body = re.match(r"\s*(const|noexcept|override|final|\s|->\s*[\w:<>]+)*[{:]", text[at:])
        if body and name not in ("if", "for", "while", "switch", "catch", "operator", "requires"):
            yield name, commas + 1


def test_no_function_takes_more_than_six_arguments() -> None:
    count = 0
    for path in SOURCES:
        where = str(path.relative_to(CSRC))
        for name, parameters in functions(path.read_text()):
            count += 1
            exempt = name in OPERATIONS.get(where, ())
            assert parameters <= 6 or exempt, f"{where}: {name} takes {parameters}; use a struct"
    assert count > 400


def test_arguments_are_counted() -> None:
    text = """
    // f(a, b)
    template <class T, int n>
    void seven(int a, std::pair<int, int> b, int c, int d, int e, int (*f)(int, int), int g) {
    """
    assert list(functions(text)) == [("seven", 7)]
