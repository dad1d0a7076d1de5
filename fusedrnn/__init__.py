"""Fused LSTM, GRU and RNN layers for PyTorch that drop in for torch.nn's."""

from . import functional
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
