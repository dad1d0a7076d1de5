"""Fused LSTM, GRU and RNN layers for PyTorch that drop in for torch.nn's.

FusedLSTM, FusedGRU, FusedRNN           layers, as torch.nn's, and `lengths=` for padded batches
FusedLSTMCell, FusedGRUCell, ...        one step of each
convert, revert, to_torch               a model's layers made fused in place, and back; a copy
patch_torch                             programs that build torch.nn's layers build fused ones
functional                              `lstm`, `gru` and `rnn` on given weights
onnx, keras                             to and from files and layers of others
show_config                             what was compiled, and what runs
"""

from . import functional
from . import keras as keras
from . import onnx as onnx
from ._cell_modules import FusedGRUCell, FusedLSTMCell, FusedRNNCell
from ._conversion import convert, revert, to_torch
from ._library import show_config
from ._modules import FusedGRU, FusedLSTM, FusedRNN
from ._patch import patch_torch
from ._version import __version__

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
    "__version__",
    "convert",
    "functional",
    "patch_torch",
    "revert",
    "show_config",
    "to_torch",
]

# Pickles, messages and documentation name the place where these are public, whatever file they are
# in.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith(f"{__name__}._"):
        globals()[_name].__module__ = __name__
del _name
