"""Exports models with fused layers to ONNX, and makes fused layers from ONNX's recurrent nodes.

`export` writes a model in which every fused layer is one node: LSTM, GRU or RNN. `load` reads such
nodes, whatever exporter wrote them, and `constants` returns the other constants that the file has
for them. Both directions need the package onnx, and `export` also needs onnxscript.

    import fusedrnn.onnx

    fusedrnn.onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: "T", 1: "N"},))
    layer = fusedrnn.onnx.load("model.onnx", "encoder")
"""

from ._onnx_export import export, translations
from ._onnx_load import constants, load

__all__ = ["constants", "export", "load", "translations"]

# `load` keeps its own module, because Sphinx looks for overloads in the file of that module.
for _name in ("constants", "export", "translations"):
    globals()[_name].__module__ = __name__
del _name
