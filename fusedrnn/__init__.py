"""Fused LSTM, GRU and RNN layers for PyTorch that drop in for torch.nn's.

FusedLSTM, FusedGRU, FusedRNN           torch.nn's layers, also for padded batches (`lengths=`)
FusedLSTMCell, FusedGRUCell, ...        modules that compute one step
convert, revert                         make a model's layers fused in place, or torch.nn's again
to_torch                                makes a copy of a model with torch.nn's layers
patch_torch                             lets programs that build torch.nn's layers build fused ones
functional                              `lstm`, `gru` and `rnn` as functions of given weights
onnx                                    writes ONNX models and reads their recurrent nodes
keras                                   reads layers and weights of Keras
show_config                             prints what was compiled and which kernels run
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

# Pickles, messages and the documentation name this package as the module of these names, whatever
# file defines them.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith(f"{__name__}._"):
        globals()[_name].__module__ = __name__
del _name
