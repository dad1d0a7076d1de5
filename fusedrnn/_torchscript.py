"""Makes TorchScript refuse the layers with an error that says what to use instead.

A trace would be wrong without an error, because it would contain the batch size of the example as a
constant. The classes use the two functions as methods that only TorchScript calls, also for a
module inside another one. They are not in a base class, because `convert` cannot give a layer a
class with a second base.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ._checks import option_torch_lacks

__all__ = ["refuse_script", "refuse_trace"]


def refuse_script(module: Any) -> NoReturn:
    """Replaces ``__prepare_scriptable__``, which `torch.jit.script` calls first."""
    _refuse(module, "torch.jit.script")


def refuse_trace(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Replaces ``_slow_forward``, which torch.nn.Module calls instead of forward in a trace."""
    _refuse(module, "torch.jit.trace")


def _refuse(module: Any, caller: str) -> NoReturn:
    advice = "Use torch.export, torch.compile or fusedrnn.onnx.export"
    if not option_torch_lacks(module):
        advice += (
            "; or give TorchScript fusedrnn.to_torch(model), the same model in torch.nn's layers"
        )
    raise RuntimeError(f"{caller}: TorchScript does not support {type(module).__name__}. {advice}")
