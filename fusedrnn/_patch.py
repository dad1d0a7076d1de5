"""torch.nn's names of the recurrent layers, lent to the fused ones for a while."""

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

# Where torch itself has the names.
_MODULES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)

_lock = threading.Lock()
_open_blocks = 0
_replaced: list[tuple[ModuleType, str, Any]] = []  # what the first block found


class patch_torch(ContextDecorator):
    """A block in which nn.LSTM, nn.GRU, nn.RNN and their cells are the fused classes.

    For programs that build such layers where you cannot reach::

        with fusedrnn.patch_torch():
            third_party.main()

    or ``@fusedrnn.patch_torch()`` above a function. The names are changed in torch.nn,
    torch.nn.modules and torch.nn.modules.rnn, and change back when the block ends, also by an
    exception. Layers that were made in it stay fused. `convert` does the same to a finished model
    and is the better way where you hold one.

    In a block:

    - ``isinstance(layer, nn.LSTM)`` is true of fused layers and false of torch.nn's own, and a
      class that is derived from nn.LSTM is derived from FusedLSTM. After the block the opposite
      holds: the fused layers are instances of nn.RNNBase (the cells of nn.RNNCellBase), not of
      nn.LSTM. Code that asks should run where the layer was made.
    - A name that a module took before, by ``from torch.nn import LSTM`` or in a table, still means
      torch.nn's class. Import such a module for the first time in the block, which is for good, or
      `convert` its models.
    - A pickle of a fused layer names fusedrnn's class and loads anywhere. A pickled torch.nn layer
      is loaded as a fused one; torch.nn's layers cannot be pickled (PicklingError), but copied.
    - ``torch.compile`` breaks the graph at what is called nn.LSTM, nn.GRU and nn.RNN, here at the
      fused layers: compile after the block, or set ``torch._dynamo.config.allow_rnn = True``.
    - ``torch.ao.quantization`` looks the names up too, and quantizes no such layer: do it after the
      block, of fused layers on what `to_torch` returns.

    Blocks may be nested. The names belong to the process: as long as a block is open in any thread,
    all threads see the fused classes, and the last block to end changes the names back. A process
    that is forked inherits them, one that is spawned starts with torch.nn's.

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
        """Decorates a function: each call of it is a block."""
        for kind, is_kind in _LATER.items():
            if is_kind(func):
                raise TypeError(
                    f"patch_torch() must decorate a function, got the {kind} {func.__qualname__}, "
                    "whose code runs after the call: open a block in it"
                )
        return super().__call__(func)


# Calls of these return before their code has run, or not all of it.
_LATER: dict[str, Callable[[object], bool]] = {
    "class": inspect.isclass,
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "asynchronous generator": inspect.isasyncgenfunction,
}
