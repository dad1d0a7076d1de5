"""What people outside hold on to: forms, the workflow of a host, lists that a document repeats."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="requirements-docs.txt is not installed")

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(
    path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"
)
# What a host knows to draw, and the attribute that each kind must have.
KINDS = {
    "markdown": "value",
    "textarea": "label",
    "input": "label",
    "dropdown": "options",
}


def load(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def section(page: str, heading: str) -> str:
    """The text of a page from a heading to the next of its rank."""
    text = (ROOT / page).read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"{page} has no section {heading!r}"
    return found[1]


# --- Forms and the workflow ---------------------------------------------------------------------


def test_there_are_forms_for_a_fault_for_numbers_and_for_a_proposal() -> None:
    assert [path.stem for path in FORMS] == ["bug", "numbers", "rfc"]
    assert load(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_a_host_needs(path: Path) -> None:
    form = load(path)
    assert set(form) == {"name", "description", "labels", "body"}
    assert isinstance(form["name"], str)
    assert isinstance(form["description"], str)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"}, field
        assert field["attributes"].get(KINDS[field["type"]]), field
        assert set(field.get("validations", {})) <= {"required"}, field
    assert any(field.get("validations") == {"required": True} for field in form["body"])


@pytest.mark.parametrize("name", ["bug", "numbers"])
def test_a_fault_comes_with_a_program_and_the_configuration(name: str) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    required = {f["id"] for f in form["body"] if f.get("validations") == {"required": True}}
    assert {"program", "config"} <= required


def test_the_workflow_runs_the_one_script() -> None:
    assert [path.name for path in (ROOT / ".github/workflows").iterdir()] == ["ci.yml"]
    workflow = load(".github/workflows/ci.yml")
    # YAML 1.1 takes the key `on` for a truth value.
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    assert job["timeout-minutes"] == 60
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert (ROOT / ".ci/run").is_file()
    (python,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert python == {"python-version": "3.11"}
    # Where packages come from is the host's to say, not the file's.
    assert "://" not in (ROOT / ".github/workflows/ci.yml").read_text()


def test_pull_requests_are_asked_who_is_affected_and_what_ran() -> None:
    template = (ROOT / ".github/pull_request_template.md").read_text()
    assert re.findall(r"^## (.*)", template, re.M) == [
        "What changes, and why",
        "Who is affected",
        "What ran",
    ]
    lines = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = re.findall(r"`make (\w+)`", template)
    assert commands
    assert set(commands) <= {target for line in lines for target in line.split()}
    assert "`bash .ci/run`" in template


# --- The hooks before a commit are those of `make lint` -----------------------------------------


def hooks() -> dict[str, Any]:
    (local,) = load(".pre-commit-config.yaml")["repos"]
    return {hook["id"]: hook for hook in local["hooks"]}


def test_hooks_format_the_files_that_lint_checks() -> None:
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^CXX_FILES = \$\(shell find (.*?) -name (.*)\)$", makefile, re.M)
    assert found is not None
    folders = found[1].split()
    kinds = re.findall(r"'\*(\.\w+)'", found[2])
    assert folders
    assert kinds
    pattern = re.compile(hooks()["clang-format"]["files"])
    for folder in folders:
        for kind in kinds:
            assert pattern.search(f"{folder}/in/a_file{kind}"), (folder, kind)
    assert not pattern.search("csrc/cuda/README.md")
    assert not pattern.search("build/a.cpp")


def test_hooks_have_the_versions_that_lint_has() -> None:
    pinned = (ROOT / "requirements-dev.txt").read_text().splitlines()
    needed = {word for hook in hooks().values() for word in hook.get("additional_dependencies", ())}
    assert {word.split("==")[0] for word in needed} == {"ruff", "clang-format"}
    assert needed <= set(pinned)


# --- Lists in documents -------------------------------------------------------------------------


def test_the_api_page_lists_what_is_public() -> None:
    rows = dict(
        re.findall(r"^\| (.*?) \| (.*) \|$", section("docs/api.md", "What is public"), re.M)
    )
    assert rows["`fusedrnn.sb3`"] == "`fuse`"  # the module needs sb3-contrib
    for module in ("functional", "onnx", "keras"):
        named = re.findall(r"`(\w+)`", rows[f"`fusedrnn.{module}`"])
        assert sorted(named) == sorted(importlib.import_module(f"fusedrnn.{module}").__all__)
    functions = [name for name in importlib.import_module("fusedrnn").__all__ if name.islower()]
    functions = [name for name in functions if name != "functional"]
    assert sorted(re.findall(r"`(\w+)`", rows["`fusedrnn`"])) == sorted(functions)


def environment_variables() -> set[str]:
    """Those that the library and its build read."""
    sources = [
        *(ROOT / "csrc").glob("**/*.h"),
        *(ROOT / "csrc").glob("**/*.cpp"),
        *(ROOT / "fusedrnn").glob("*.py"),
        ROOT / "setup.py",
        ROOT / "setup_build.py",
    ]
    read = r'(?:getenv\(|environ(?:\.get\(|\.pop\(|\[)|_switch\(|asked_for\()"(\w+)"'
    return {name for path in sources for name in re.findall(read, path.read_text())}


def test_the_api_page_lists_the_variables_of_the_environment() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("docs/api.md", "What is installed"), re.M)
    listed = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    assert listed == environment_variables()


def test_the_glossary_has_an_index_of_all_its_words() -> None:
    page = (ROOT / "docs/glossary.md").read_text()
    words = re.findall(r"^### (.*)", page, re.M)
    index = re.findall(r"\[([^]]+)\]\(#", page[: page.index("\n## ")])
    assert index == sorted(words, key=str.lower)
    letters = re.findall(r"^\| (\w) \|", section("docs/glossary.md", "Size letters"), re.M)
    assert letters == list("TNSIHPGDLK")


def test_decisions_say_when_why_and_until_when() -> None:
    page = (ROOT / "docs/design.md").read_text()
    decisions = re.split(r"^## ", page, flags=re.M)[1:]
    assert [d.split(".")[0] for d in decisions] == [str(n) for n in range(1, 11)]
    for decision in decisions:
        assert re.search(r"^\*20\d\d-\d\d-\d\d", decision, re.M), decision[:60]
        for part in ("Reason", "Evidence", "To overturn it"):
            assert f"\n*{part}.* " in decision, (part, decision[:60])


def test_the_cuda_readme_counts_the_kernels() -> None:
    def kernels(folder: str) -> int:
        sources = (ROOT / "csrc" / folder).glob("*.cu")
        return sum(len(re.findall(r"FUSEDRNN_KERNEL\(\w+\)", path.read_text())) for path in sources)

    text = " ".join((ROOT / "csrc/cuda/README.md").read_text().split())
    engine, bindings = kernels("cuda"), kernels("torch_cuda")
    assert engine > 0
    assert bindings > 0
    assert f"The library has {engine + bindings} kernels. The engine has {engine} of them" in text
    assert f"The other {bindings} are in" in text
