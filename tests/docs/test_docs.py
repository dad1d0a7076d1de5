"""The documentation: its blocks of code run, its site builds, and its links have targets."""

from __future__ import annotations

import functools
import glob
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch
from torch import nn

import fusedrnn
import fusedrnn.keras
import fusedrnn.onnx
from tests.kit.documents import PAGES, REASON, ROOT, blocks, commands, name, tokens
from tools.draw_pictures import PICTURES

# Names that the code of a page uses without defining them.
GIVEN = {"README.md": {"model": nn.Sequential(nn.LSTM(4, 8))}}
# Programs that commands of the pages need and a machine may lack.
OPTIONAL = {"compute-sanitizer", "nvcc", "torchrun", "chromium"}


def is_python(info: str) -> bool:
    return info.split(" ")[0] == "python"


WITH_PYTHON = [page for page in PAGES if any(is_python(info) for _, info, _ in blocks(page))]


# Warnings that torch and other packages raise about themselves: docs/migrate.md shows that
# torch.nn's layers cannot be exported, and docs/interop.md exports to ONNX and loads a Keras layer.
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Python blocks of a page in order, in one fresh namespace.

    A block marked `python no-run` is not run; its first line says why.
    """
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    namespace = {"__name__": name(page), **GIVEN.get(name(page), {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, info, text in blocks(page):
            if info == "python no-run":
                assert text.startswith("# Not run: "), f"{name(page)}:{line} does not say why"
            elif is_python(info):
                assert info == "python", f"{name(page)}:{line}: what is {info!r}?"
                # The line breaks make a traceback name the right line of the page.
                exec(compile("\n" * line + text, str(page), "exec"), namespace)


def problem(words: list[str]) -> str:
    """The reason why a command cannot run, or an empty string. The command is not run for this."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
        known = {word for line in targets for word in line.split()}
        asked = [word for word in rest if "=" not in word and not word.startswith("-")]
        return "".join(f"no target {word}. " for word in asked if word not in known)
    if program in ("python", "torchrun", "bash"):
        scripts = [word for word in rest if word.endswith((".py", ".sh")) or "/" in word]
        if "-c" in rest:
            return ""
        if "-m" in rest:
            module = rest[rest.index("-m") + 1]
            if find_spec(module.split(".")[0]) is None:
                return f"no module {module}"
        elif program == "python" and scripts:
            script = ROOT / scripts[0]
            if not script.is_file():
                return f"no file {scripts[0]}"
            if script.parent.name != "examples":
                return ""
            # Its long options are in its source or in the module that the programs share.
            source = script.read_text() + (ROOT / "examples/common.py").read_text()
            options = [word.split("=")[0] for word in rest if word.startswith("--")]
            return "".join(
                f"{scripts[0]} has no {option}. "
                for option in options
                if option != "--help" and f'"{option}"' not in source
            )
        return ""
    if program in OPTIONAL or shutil.which(program):
        return ""
    return f"no program {program}"


SHELL_WORDS = {"for", "do", "done", "export", "cd"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands(page: Path) -> None:
    wrong = [
        f"{place}: {' '.join(words)}: {problem(words)}"
        for place, words in commands(page)
        if words[0] not in SHELL_WORDS and problem(words)
    ]
    assert not wrong, "\n".join(wrong)


# Modules that parse their options, so that a command line with --help appended is checked.
READ_OPTIONS = {"fusedrnn", "fusedrnn.selftest", "benchmarks", "tools.cuda_estimates", "tools.gpu"}
MODULES = sorted(
    {
        tuple(words[2:])
        for page in PAGES
        for _, words in commands(page)
        if words[:2] == ["python", "-m"] and words[2] in READ_OPTIONS
    }
)


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_command_lines_of_modules_are_understood(words: tuple[str, ...]) -> None:
    """Runs each command line with --help appended; one with --shape is quick and runs as it is."""
    more = [] if "--shape" in words else ["--help"]
    done = subprocess.run(
        [sys.executable, "-m", *words, *more], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def slugs(page: Path) -> set[str]:
    """Anchors of the headings of a page and of the pages that it includes, in GitHub's form."""
    found = set()
    for token, after in pairwise(tokens(page)):
        if token.type == "heading_open":
            title = "".join(child.content for child in after.children)
            found.add(re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-"))
    for _, info, _ in blocks(page):
        if info.startswith("{include} "):
            found |= slugs(page.parent / info.removeprefix("{include} "))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_files(page: Path) -> None:
    wrong = []
    for token in tokens(page):
        for child in token.children or ():
            link = child.attrGet("href") or child.attrGet("src") or ""
            if not link or re.match(r"\w+:", link):
                continue
            path, anchor = urldefrag(unquote(link))
            target = page.parent / path if path else page
            in_a_page = anchor and target.suffix == ".md" and target.exists()
            if not target.exists() or (in_a_page and anchor not in slugs(target)):
                wrong.append(link)
    assert not wrong, f"{name(page)} links to what is not there: {', '.join(wrong)}"


FOLDERS = r"\.ci|\.github|benchmarks|csrc|docs|examples|findings|fusedrnn|tests|tools|\.\."
# Paths that are named on the pages and are not in the repository, each with the reason.
NOT_IN_THE_REPOSITORY = {
    "csrc/cells/lstm_coupled.h",  # the reader of docs/adding-a-cell.md writes this file
    "fusedrnn/_cuda.so",  # the build makes this file
    "benchmarks/results/gpu-*",  # tools.gpu writes these folders on a machine with a GPU
    "benchmarks/results/gpu-<card>-<date>/",
}


def missing_paths(page: Path) -> list[str]:
    """Paths and tests in `code` on a page that do not exist.

    A path begins at the repository's root or at the page, and may hold * and <placeholders>. The
    name of a test stands alone or behind a path and two colons.
    """
    missing = []
    for token in tokens(page):
        for child in token.children or ():
            text = child.content
            if child.type != "code_inline":
                continue
            if re.fullmatch(r"test_\w+", text):
                text = f"tests/*/test_*.py::{text}"
            elif not re.fullmatch(rf"({FOLDERS})/\S*", text):
                continue
            path, _, test = text.partition("::")
            pattern = re.sub(r"<\w+>", "*", path)
            found = [file for at in (ROOT, page.parent) for file in glob.glob(f"{at}/{pattern}")]
            if test and f"def {test}(" not in "".join(Path(file).read_text() for file in found):
                found = []
            if not found and text not in NOT_IN_THE_REPOSITORY:
                missing.append(text)
    return missing


# The changelog may name files of older releases.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_paths_in_the_repository_exist(page: Path) -> None:
    missing = missing_paths(page)
    assert not missing, f"{name(page)} names what does not exist: {', '.join(missing)}"


@pytest.mark.parametrize(
    "path",
    [
        "csrc/cpu/absent.h",
        "csrc/absent_<isa>.cpp",
        "../absent",
        "tests/docs/test_docs.py::test_x",
        "test_x",
    ],
)
def test_a_path_that_does_not_exist_is_found(tmp_path: Path, path: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"See `{path}`, `csrc/cpu/layer.h`, `csrc/cpu/kernels_<isa>.cpp` and `test_commands`."
    )
    (missing,) = missing_paths(page)
    assert missing.endswith(path)


@functools.cache
def words_of_code(place: str) -> list[set[str]]:
    """The words in the code of each file of a place: a file, or a folder. Comments are left out."""
    comment = {".py": r"#.*"} | dict.fromkeys((".h", ".cpp", ".inl", ".cu", ".cuh"), r"//.*")
    files = [path for path in (ROOT / place, *(ROOT / place).rglob("*")) if path.is_file()]
    return [
        set(re.findall(r"\w+", re.sub(comment[path.suffix], "", path.read_text())))
        for path in files
        if path.suffix in comment
    ]


def wrong_places(page: Path) -> list[str]:
    """What a glossary says of places and is not so.

    `word` in `path`, anywhere on the page, says that the file or a file of the folder has the word.
    A word without a path, in a sentence that begins with *Where*, is in some file. Each path of
    such a sentence exists.
    """
    text = " ".join(page.read_text().split())
    path = r"`((?:csrc|fusedrnn|tests)/[^`]*)`"
    said = set()  # pairs of a word and a place, which is empty for a word without a path
    for words, place in re.findall(rf"(`[^`]+`(?:(?:,| and) `[^`]+`)*)[^`.;]* in {path}", text):
        said |= {(word, place) for word in re.findall("`([^`]+)`", words)}
    placed = {word for word, _ in said}
    for sentence in re.findall(r"\*Where\*: (.*?\.)(?= |$)", text):
        said |= {(word, "") for word in re.findall("`([^`]+)`", sentence) if word not in placed}
    wrong = []
    for word, place in sorted(said):
        if "/" in word:
            right = (ROOT / word).exists()
        else:
            parts = set(re.findall(r"\w+", word))
            places = [place] if place else ["csrc", "fusedrnn", "tests"]
            right = any(parts <= code for where in places for code in words_of_code(where))
        if not right:
            wrong.append(f"{word} in {place}" if place else word)
    return wrong


def test_places_in_the_glossary() -> None:
    wrong = wrong_places(ROOT / "docs/glossary.md")
    assert not wrong, f"docs/glossary.md is wrong about {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("*Where*: `Plan` and `Panels` in `csrc/cpu/plan.h`, where plans are.", "Panels"),
        ("*Where*: `csrc/cpu/plan.h`, `Plan::as_un{}stored`.", "Plan::as_un{}stored"),
        ("*Where*: `Plan`, in `csrc/cpu/absent.h`.", "Plan in csrc/cpu/absent.h"),
        ("*Where*: `csrc/cpu/absent.h`. *Not*: `nothing`.", "csrc/cpu/absent.h"),
        ("A plan. (`ResidentTile` in `csrc/cpu/plan.h`.)", "ResidentTile in csrc/cpu/plan.h"),
    ],
)
def test_a_wrong_place_is_found(tmp_path: Path, said: str, wrong: str) -> None:
    page = tmp_path / "page.md"
    page.write_text("*Where*: `Plan` in `csrc/cpu/plan.h`. " + said.replace("{}", "_"))
    assert wrong_places(page)[0].startswith(wrong.replace("{}", "_"))


class Html(HTMLParser):
    """The anchors of a page of the site, its links, and the files that a browser loads with it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and "href" in values:
            self.loads.append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])


Site = dict[str, Html | None]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The files of the built site by path. A warning of Sphinx is an error."""
    pytest.importorskip("sphinx", reason=REASON)
    pytest.importorskip("furo", reason=REASON)
    pytest.importorskip("myst_parser", reason=REASON)
    pytest.importorskip("ziamath", reason=REASON)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "docs", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(p.relative_to(out)): Html(p) if p.suffix == ".html" else None for p in files}


def test_links_of_the_site(site: Site) -> None:
    wrong = []
    for page, content in site.items():
        if content is None:
            continue
        for link in [*content.links, *content.loads]:
            if re.match(r"\w+:|//", link):
                continue
            path, anchor = urldefrag(unquote(link))
            path = path.split("?")[0]
            target = str((Path("/") / Path(page).parent / path).resolve())[1:] if path else page
            if target not in site:
                wrong.append(f"{page}: {link}: no file")
            elif anchor and site[target] is not None and anchor not in site[target].ids:
                wrong.append(f"{page}: {link}: no anchor")
    assert not wrong, "\n".join(wrong)


def test_the_site_needs_no_network(site: Site) -> None:
    loads = {link for content in site.values() if content for link in content.loads}
    assert loads
    assert not [link for link in loads if re.match(r"\w+:|//", link)]


def test_every_public_name_is_on_the_api_page(site: Site) -> None:
    names = [f"fusedrnn.{name}" for name in fusedrnn.__all__ if name != "functional"]
    for module in (fusedrnn.functional, fusedrnn.onnx, fusedrnn.keras):
        names += [f"{module.__name__}.{name}" for name in module.__all__]
    names.append("fusedrnn.sb3.fuse")  # the module needs sb3-contrib, and the site does not
    names += [f"fusedrnn.{name}.forward" for name in fusedrnn.__all__ if name.startswith("Fused")]
    assert not set(names) - site["api.html"].ids


def test_pictures_are_up_to_date() -> None:
    for file, draw in PICTURES.items():
        assert (ROOT / "docs/images" / file).read_text() == draw().svg(), (
            "python -m tools.draw_pictures docs/images"
        )
