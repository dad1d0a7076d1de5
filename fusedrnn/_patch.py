"""Replaces torch.nn's recurrent layers by the fused ones, by name, within a block."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from ._conversion import _FUSED

__all__ = ["patch_torch"]

F = TypeVar("F", bound=Callable[..., Any])

# The modules of torch that have the names.
_MODULES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)

_lock = threading.Lock()
_open_blocks = 0
_replaced: list[tuple[ModuleType, str, Any]] = []  # what the names meant before the first block


class patch_torch(ContextDecorator):
    """A block in which nn.LSTM, nn.GRU, nn.RNN and their cell modules are the fused classes.

    Use it for programs that build these layers in code that you cannot change::

        with fusedrnn.patch_torch():
            third_party.main()

    or put ``@fusedrnn.patch_torch()`` above a function. The block replaces the names in torch.nn,
    torch.nn.modules and torch.nn.modules.rnn. When it ends, even by an exception, the names mean
    torch.nn's classes again. Layers that were made in the block stay fused. If you have the
    finished model, `convert` does the same and is the better way.

    In a block:

    - ``isinstance(layer, nn.LSTM)`` is true for fused layers and false for torch.nn's layers, and a
      class that is derived from nn.LSTM is derived from FusedLSTM. After the block the fused layers
      are instances of nn.RNNBase (the cell modules of nn.RNNCellBase) and not of nn.LSTM. So code
      that checks the class should run where the layer was made.
    - A name that a module has copied before, by ``from torch.nn import LSTM`` or into a table,
      still means torch.nn's class. Either import such a module for the first time within the block,
      after which it keeps the fused classes for good, or `convert` its models.
    - A pickle of a fused layer names fusedrnn's class and can be loaded anywhere. A pickle of a
      torch.nn layer is loaded as a fused layer. A torch.nn layer can be copied but not pickled
      (PicklingError).
    - ``torch.compile`` breaks the graph at instances of nn.LSTM, nn.GRU and nn.RNN, which are the
      fused layers here. Compile after the block, or set ``torch._dynamo.config.allow_rnn = True``.
    - ``torch.ao.quantization`` uses these names too, and quantizes none of these layers. Quantize
      after the block. For a model with fused layers, quantize the copy that `to_torch` returns.

    Blocks may be nested. The names belong to the process: as long as a block is open in any thread,
    all threads see the fused classes, and the end of the last block restores the names. A forked
    process inherits the fused classes, and a spawned process starts with torch.nn's.

    Raises:
        TypeError: it decorates a class, a coroutine or a generator, whose code runs after the call.
    """

    def __enter__(self) -> None:
        global _open_blocks
        with _lock:
            _open_blocks += 1
            if _open_blocks > 1:
                return
            for module in _MODULES:
                for plain, fused in _FUSED.items():
                    name = plain.__name__
                    _replaced.append((module, name, getattr(module, name)))
                    setattr(module, name, fused)

    def __exit__(self, *exception: object) -> None:
        global _open_blocks
        with _lock:
            _open_blocks -= 1
            if _open_blocks > 0:
                return
            for module, name, found in _replaced:
                setattr(module, name, found)
            _replaced.clear()

    def __call__(self, func: F) -> F:
        """Decorates a function, so that each call of it runs in a block."""
        for kind, is_kind in _LATER.items():
            if is_kind(func):
                raise TypeError(
                    f"patch_torch() must decorate a function, got the {kind} {func.__qualname__}, "
                    "whose code runs after the call: open a block in it"
                )
        return super().__call__(func)


# A call of one of these returns before all of its code has run.
_LATER: dict[str, Callable[[object], bool]] = {
    "class": inspect.isclass,
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "asynchronous generator": inspect.isasyncgenfunction,
}
