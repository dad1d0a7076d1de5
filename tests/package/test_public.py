"""The public modules, and the names of classes in pickles."""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path

import pytest
import torch

import fusedrnn
import fusedrnn.keras
import fusedrnn.onnx

PUBLIC = {"functional", "keras", "onnx", "sb3", "selftest"}
NAMES = [n for n in fusedrnn.__all__ if n not in ("__version__", "functional")]


def test_all_other_modules_are_private() -> None:
    names = {path.stem for path in Path(fusedrnn.__file__).parent.glob("*.py")}
    assert {name for name in names if not name.startswith("_")} == PUBLIC


@pytest.mark.parametrize("module", [fusedrnn, fusedrnn.functional, fusedrnn.keras, fusedrnn.onnx])
def test_public_names_have_the_public_module(module: object) -> None:
    names = NAMES if module is fusedrnn else module.__all__  # type: ignore[attr-defined]
    for name in names:
        if (module, name) == (fusedrnn.onnx, "load"):
            continue  # the documentation finds the overloads of load by its file
        assert getattr(module, name).__module__ == module.__name__  # type: ignore[attr-defined]


def test_the_public_names_of_the_module_for_sb3() -> None:
    pytest.importorskip("sb3_contrib", reason="requirements-ecosystem.txt is not installed")
    module = importlib.import_module("fusedrnn.sb3")
    assert module.__all__ == ["fuse"]
    assert module.fuse.__module__ == "fusedrnn.sb3"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("Fused")])
def test_pickles_name_the_public_class(name: str) -> None:
    """Files of whole modules then load even if the class moves inside the package."""
    cls = getattr(fusedrnn, name)
    assert pickle.dumps(cls, protocol=0).startswith(f"cfusedrnn\n{name}\n".encode())
    module, file = cls(3, 4), io.BytesIO()
    torch.save(module, file)
    assert b"fusedrnn._" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is cls
    assert all(map(torch.equal, loaded.parameters(), module.parameters()))
