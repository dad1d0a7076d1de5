"""Says in words that TorchScript cannot take the layers.

A trace would be wrong without a word: it keeps the batch that it saw as a constant. Both functions
are methods that TorchScript alone calls, also of a module inside another one. They are not a base
class, because `convert` could not give its layers a class with a second base.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["refuse_script", "refuse_trace"]


def refuse_script(module: Any) -> NoReturn:
    """Stands for ``__prepare_scriptable__``, which `torch.jit.script` calls first."""
    _refuse(module, "torch.jit.script")


def refuse_trace(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands for ``_slow_forward``, which torch.nn.Module calls instead of forward in a trace."""
    _refuse(module, "torch.jit.trace")


def _refuse(module: Any, caller: str) -> NoReturn:
    raise RuntimeError(
        f"{caller}: TorchScript does not support {type(module).__name__}. Use torch.export, "
        "torch.compile or fusedrnn.onnx.export; or give TorchScript fusedrnn.to_torch(model), the "
        "same model in torch.nn's layers"
    )
