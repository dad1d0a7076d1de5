"""Makes virtual environments for tests of the installed package.

An environment holds torch, the packages that torch requires, and those that a test asks for.
Nothing is downloaded: the packages are links to those of the Python that runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def requirements(name: str, found: dict[str, Distribution] | None = None) -> list[Distribution]:
    """The package `name` and all packages that it requires on this machine, without its extras."""
    found = {} if found is None else found
    if name not in found:
        found[name] = distribution(name)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                requirements(needed.name.lower().replace("_", "-"), found)
    return list(found.values())


def make(folder: Path, *others: str) -> tuple[Path, Path]:
    """Makes an environment in `folder`, with the packages `others` beside torch.

    Returns the paths of its Python and of its site-packages.
    """
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
