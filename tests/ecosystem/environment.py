"""A new environment for tests of the installed package: torch, and what torch itself requires.

Nothing is downloaded: the packages are links to those that run the tests. All others are missing,
but for those that a test asks for.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def requirements(name: str, found: dict[str, Distribution] | None = None) -> list[Distribution]:
    """The package `name` and all that it requires here, extras left out."""
    found = {} if found is None else found
    if name not in found:
        found[name] = distribution(name)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                requirements(needed.name.lower().replace("_", "-"), found)
    return list(found.values())


def make(folder: Path, *others: str) -> tuple[Path, Path]:
    """Makes one in `folder`, with others beside torch; returns its Python and where packages go."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    found: dict[str, Distribution] = {}
    for name in ("torch", *others):
        requirements(name, found)
    for package in found.values():
        assert package.files, f"{package.name} does not say what it installed"
        for name in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            link = site / name
            if not link.exists():
                link.symlink_to(package.locate_file(name))
    return folder / "bin" / "python", site
