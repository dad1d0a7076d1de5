"""Prints the lines of a requirements file whose package this environment lacks.

Packages that are installed are not listed, even if the file pins another version. So an environment
that make did not create keeps its versions.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

# An installed package that is older than this cannot be used; see pyproject.toml's build-system.
OLDEST = {"setuptools": 77}


def is_missing(name: str) -> bool:
    """Whether the package `name` is not installed, or too old for the build."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return True
    return int(found.split(".")[0]) < OLDEST.get(name, 0)


def main(path: str) -> None:
    """Prints the requirements in the file `path` that are missing."""
    with open(path) as file:
        for line in file:
            name = re.match(r"[\w.-]+", line)
            if name and is_missing(name[0]):
                print(line, end="")


if __name__ == "__main__":
    main(sys.argv[1])
