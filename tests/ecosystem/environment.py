"""A new environment for tests of the installed package: empty, but for the torch that runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def make(folder: Path) -> tuple[Path, Path]:
    """Makes one in `folder`; returns its Python and the folder where packages go."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "bin" / "python", site
