"""Alters valid ONNX files at random and loads them. It limits the memory of its own process.

    python -m tests.ecosystem.onnx_fuzz --seed 0 --count 1000

Loading a file must raise a ValueError or return layers that can be called. If onnx's reference
evaluator can compute their weights, the weights must be the same. Any other outcome is printed with
the seed that repeats it.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from onnx.reference import ReferenceEvaluator

import fusedrnn.onnx
from fusedrnn._onnx import TO_ONNX
from tests.ecosystem.onnx_models import (
    PREPARED,
    call,
    external,
    make_model,
    make_weights,
    node,
    opset,
    prepared,
    quantized,
    state,
    value,
    with_functions,
    with_states,
)

MEMORY = 1 << 30  # bytes that the process may allocate beyond those that it has after the start
NUMBERS = [
    -(2**63),
    -(2**31),
    -7,
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    6,
    24,
    25,
    96,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
]
# Operators that load knows, and others whose outputs could be large or that run other graphs.
OPERATORS = [
    *["Identity", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Gather", "Split"],
    *["Transpose", "Cast", "Add", "Sub", "Mul", "Div", "ReduceL2", "Expand", "Tile"],
    *[
        "ConstantOfShape",
        "DequantizeLinear",
        "QuantizeLinear",
        "Constant",
        "RandomNormal",
        "If",
        "Loop",
        "Scan",
    ],
    *["Range", "NonZero", "OneHot", "Resize", "Pad", "Einsum", "MatMul", "Where", "LSTM", "GRU"],
]
ATTRIBUTES = ["axis", "axes", "perm", "to", "starts", "ends", "split", "num_outputs", "value"]
ATTRIBUTES += ["block_size", "keepdims", "allowzero", "hidden_size", "direction", "activations"]


def files() -> list[Any]:
    """Valid models of every kind that load reads."""
    result = [prepared(*PREPARED[case]) for case in PREPARED]
    for operator in TO_ONNX:
        for D in (1, 2):
            way = {"direction": "bidirectional"} if D == 2 else {}
            result.append(make_model([node(operator, **way)], make_weights(operator, D)))
    double = make_weights("LSTM", 1, torch.float64)
    result.append(make_model([node("LSTM", layout=1)], double))
    lens = np.array([5, 2, 3], np.int32)
    result.append(with_states("LSTM", h=state(1, 3, 6), c=state(1, 3, 6), lens=lens))
    model = prepared(
        [helper.make_node("DequantizeLinear", ["q", "s"], ["W"])], {"s": np.float32(0.5)}, 21
    )
    model.graph.initializer.append(quantized(TensorProto.INT8, 1, 24, 4))
    result.append(model)
    inputs = ["X", "Wq", "Rq", "", "", "", "", "", "s", "z", "s", "z"]
    lstm = helper.make_node("DynamicQuantizeLSTM", inputs, ["Y"], "it", domain="com.microsoft")
    integers = {"Wq": np.ones((1, 4, 24), np.int8), "Rq": np.ones((1, 6, 24), np.int8)}
    integers |= {"s": np.ones(1, np.float32), "z": np.zeros(1, np.int8)}
    result.append(opset(make_model([lstm], integers), 17))
    result.append(with_functions([call(1)], [call(2), node("LSTM")], [node("LSTM", "")]))
    branch = helper.make_graph([node("GRU", "inner")], "branch", [], [value("Y")])
    choice = helper.make_node("If", ["c"], ["Y"], then_branch=branch, else_branch=branch)
    result.append(make_model([choice], {**make_weights("GRU", 1), "c": np.array(True)}))
    return result


# --- Alterations ---------------------------------------------------------------------------------


def graphs_of(model: Any) -> list[Any]:
    result = [model.graph, *model.functions]
    for graph in result:
        result += [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return result


def alter_tensor(rng: random.Random, model: Any) -> None:
    nodes = [n for g in graphs_of(model) for n in g.node]
    tensors = [a.t for n in nodes for a in n.attribute if a.HasField("t")]
    tensors += list(model.graph.initializer)
    if not tensors:
        return
    tensor = rng.choice(tensors)
    what = rng.randrange(7)
    if what == 0:
        tensor.data_type = rng.choice([*TensorProto.DataType.values(), 99, -1])
    elif what == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif what == 2:
        dims = list(tensor.dims)
        rng.shuffle(dims)
        tensor.dims[:] = dims
    elif what == 3:
        data = bytearray(tensor.raw_data)
        del data[: rng.choice([1, 4, 8])]
        tensor.raw_data = bytes(data)
    elif what == 4 and tensor.raw_data:
        data = bytearray(tensor.raw_data)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        tensor.raw_data = bytes(data)
    elif what == 5:
        tensor.dims.append(rng.choice(NUMBERS))
    else:
        tensor.CopyFrom(rng.choice(tensors))


def alter_names(rng: random.Random, model: Any) -> None:
    graph = rng.choice(graphs_of(model))
    places = [(n.input, k) for n in graph.node for k in range(len(n.input))]
    places += [(n.output, k) for n in graph.node for k in range(len(n.output))]
    if not places:
        return
    (a, j), (b, k) = rng.choice(places), rng.choice(places)
    if rng.random() < 0.5:
        a[j], b[k] = b[k], a[j]
    else:
        a[j] = rng.choice(["", "X", b[k], b[k], "none"])


def random_attribute(rng: random.Random, name: str) -> Any:
    numbers = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
    values: list[Any] = [*NUMBERS, numbers or [0], rng.random(), "reverse", b"\xff", [b"\xff"]]
    values.append(numpy_helper.from_array(np.array(numbers, np.int64)))
    return helper.make_attribute(name, rng.choice(values))


def alter_attributes(rng: random.Random, model: Any) -> None:
    nodes = [n for g in graphs_of(model) for n in g.node]
    if not nodes:
        return
    target = rng.choice(nodes)
    if not target.attribute or rng.random() < 0.3:
        target.attribute.append(random_attribute(rng, rng.choice(ATTRIBUTES)))
        return
    found = rng.choice(target.attribute)
    what = rng.randrange(6)
    if what == 0:
        found.type = rng.choice([*AttributeProto.AttributeType.values()])
    elif what == 1:
        target.attribute.remove(found)
    elif what == 2:
        found.name = rng.choice(ATTRIBUTES)
    elif what == 3 and found.ints:
        found.ints[rng.randrange(len(found.ints))] = rng.choice(NUMBERS)
    elif what == 4:
        found.i = rng.choice(NUMBERS)
    else:
        found.CopyFrom(random_attribute(rng, found.name))


def alter_nodes(rng: random.Random, model: Any) -> None:
    graph = rng.choice(graphs_of(model))
    names = [o for n in graph.node for o in (*n.output, *n.input)]
    if not names:
        return
    target = rng.choice(graph.node)
    what = rng.randrange(6)
    if what == 0:
        target.op_type = rng.choice(OPERATORS)
    elif what == 1:
        target.domain = rng.choice(["", "ai.onnx", "com.microsoft", "own"])
    elif what == 2:
        graph.node.remove(target)
    elif what == 3:
        graph.node.append(target)
    elif target.input:  # insert a node between this node and one of its inputs
        k = rng.randrange(len(target.input))
        more = [rng.choice(names) for _ in range(rng.randrange(3))]
        new = helper.make_node(rng.choice(OPERATORS), [target.input[k], *more], ["new"])
        if rng.random() < 0.7:
            new.attribute.append(random_attribute(rng, rng.choice(ATTRIBUTES)))
        target.input[k] = "new"
        graph.node.insert(0, new)


def alter_model(rng: random.Random, model: Any) -> None:
    what = rng.randrange(4)
    if what == 0:
        for each in model.opset_import:
            each.version = rng.choice([0, 1, 5, 7, 10, 13, 18, 21, 99])
    elif what == 1 and model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        model.graph.input.append(value(tensor.name, *tensor.dims))
        if rng.random() < 0.5:
            model.graph.initializer.remove(tensor)
    elif what == 2 and model.functions:
        function = rng.choice(model.functions)
        function.name = rng.choice(["F0", "F1", "F2", "LSTM"])
    elif model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        tensor.data_location = TensorProto.EXTERNAL
        where = rng.choice(["W.bin", "none", "../W.bin", "/dev/zero", "."])
        tensor.external_data.add(key="location", value=where)
        for key in ("offset", "length"):
            if rng.random() < 0.5:
                tensor.external_data.add(key=key, value=str(rng.choice(NUMBERS)))


ALTERATIONS: list[Callable[[random.Random, Any], None]] = [
    *[alter_tensor, alter_names, alter_attributes, alter_nodes, alter_model]
]


def altered_bytes(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    what = rng.randrange(4)
    if what == 0:
        del result[rng.randrange(len(result)) :]
    elif what == 1:
        start = rng.randrange(len(result))
        del result[start : start + rng.choice([1, 2, 8, 100])]
    elif what == 2:
        start = rng.randrange(len(result))
        result[start:start] = result[start : start + rng.choice([1, 8, 100])]
    for _ in range(rng.randrange(4)):
        if result:
            result[rng.randrange(len(result))] = rng.randrange(256)
    return bytes(result)


# --- Judgement -----------------------------------------------------------------------------------


def reference(model: Any, name: str, folder: Path) -> Any:
    """A value of the model's graph, computed by onnx's evaluator from the nodes that it needs."""
    found: list[Any] = []
    wanted = {name}
    for each in reversed(model.graph.node):
        if wanted & {*each.output}:
            found.insert(0, each)
            wanted |= {*each.input}
    stored = [t for t in model.graph.initializer if t.name in wanted]
    for tensor in filter(uses_external_data, stored):
        load_external_data_for_tensor(tensor, str(folder))
    info = [helper.make_empty_tensor_value_info(name)]
    part = helper.make_model(
        helper.make_graph(found, "part", [], info, stored), opset_imports=model.opset_import
    )
    return ReferenceEvaluator(part).run([name], {})[0]


def judge(model: Any, layers: dict[str, Any], folder: Path) -> int:
    """Calls the layers, and compares weights; returns how many could be compared."""
    count = 0
    for name, layer in layers.items():
        assert isinstance(name, str)
        weight = layer.weight_ih_l0
        x = torch.zeros(2, 2, layer.input_size, dtype=weight.dtype)
        y, _ = layer(x)
        D = 2 if layer.bidirectional else 1
        assert y.shape == (2, 2, D * layer.hidden_size)
        fusedrnn.onnx.constants(layer)
        same = [n for n in model.graph.node if n.name == name and n.op_type in TO_ONNX]
        if len(same) != 1 or model.functions:
            continue
        order = TO_ONNX[same[0].op_type]
        for k, prefix in ((1, "weight_ih"), (2, "weight_hh")):
            try:
                expected = reference(model, same[0].input[k], folder)
            except Exception:  # onnx cannot evaluate this file, so there is nothing to compare with
                continue
            for d, suffix in enumerate(("_l0", "_l0_reverse")[:D]):
                blocks = torch.from_numpy(np.array(expected[d], np.float64)).chunk(len(order))
                ours = torch.cat([blocks[order.index(g)] for g in range(len(order))])
                got = getattr(layer, prefix + suffix).detach().double()
                torch.testing.assert_close(got, ours, rtol=1e-5, atol=1e-7, equal_nan=True)
            count += 1
    return count


def attempt(seed: int, models: list[Any], folder: Path, outcomes: Counter[str]) -> None:
    rng = random.Random(seed)
    model = onnx.ModelProto()
    model.CopyFrom(rng.choice(models))
    file = folder / "model.onnx"
    source: Any = file
    if rng.random() < 0.3:
        file.write_bytes(altered_bytes(rng, model.SerializeToString()))
    else:
        for _ in range(rng.randrange(1, 4)):
            rng.choice(ALTERATIONS)(rng, model)
        file.write_bytes(model.SerializeToString())
        source = rng.choice([file, model])
    try:
        try:
            layers = fusedrnn.onnx.load(source)
        except ValueError:
            outcomes["refused"] += 1
            return
        outcomes["loaded"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = onnx.load(file, load_external_data=False)
            outcomes["compared"] += judge(loaded, layers, folder)
    except Exception:
        outcomes["wrong"] += 1
        print(f"--seed {seed} --count 1\n{traceback.format_exc()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = files()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.append(onnx.load(external(folder), load_external_data=False))
        for model in models:  # without alterations all of them can be loaded
            (folder / "model.onnx").write_bytes(model.SerializeToString())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                judge(model, fusedrnn.onnx.load(folder / "model.onnx"), folder)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)  # load warns of states that a file holds
        for k in range(arguments.seed, arguments.seed + arguments.count):
            attempt(k, models, folder, outcomes)
    print(dict(outcomes))
    raise SystemExit(outcomes["wrong"] > 0)


if __name__ == "__main__":
    main()
