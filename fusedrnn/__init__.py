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
from ._library import show_config
from ._version import __version__
from .cells import FusedGRUCell, FusedLSTMCell, FusedRNNCell
from .conversion import convert, revert, to_torch
from .modules import FusedGRU, FusedLSTM, FusedRNN
from .patch import patch_torch

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
