"""Models with fused layers to ONNX files, and ONNX's recurrent nodes to fused layers.

`export` writes a model in which every fused layer is one node: LSTM, GRU or RNN. `load` reads such
nodes of any exporter, and `constants` gives what a file feeds to them besides weights. The
package onnx is needed for both, onnxscript for `export`.

    import fusedrnn.onnx

    fusedrnn.onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: "T", 1: "N"},))
    layer = fusedrnn.onnx.load("model.onnx", "encoder")
"""

from ._onnx_export import export, translations
from ._onnx_load import constants, load

__all__ = ["constants", "export", "load", "translations"]

# Not of `load`: Sphinx looks for overloads in the file of this name.
for _name in ("constants", "export", "translations"):
    globals()[_name].__module__ = __name__
del _name
