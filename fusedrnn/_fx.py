"""`torch.fx.symbolic_trace` takes layers and cells whole, as it does torch.nn's.

Its Tracer looks into every module that is not of the package torch.nn, and calls it with proxies in
place of tensors. A layer that is called so answers with the node that it would be as a leaf.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["CALL", "as_leaf"]

# nn.Module.__call__ as it is while nothing is traced. A Tracer puts its own function there, so a
# layer that finds this one knows that none of its arguments is a proxy.
CALL = nn.Module.__call__


def as_leaf(module: nn.Module, input: Any, hx: Any = None, lengths: Any = None) -> Any:
    """A proxy for the result of a call of `module`; None where none of its arguments is a proxy.

    Raises:
        RuntimeError: a call that cannot be a node: hooks and the forward of a subclass would run
            when it is traced and once more when the graph runs, and what is traced is no node.
    """
    values = [v for a in (input, hx, lengths) for v in (a if isinstance(a, (tuple, list)) else [a])]
    proxy = next((value for value in values if isinstance(value, fx.Proxy)), None)
    if proxy is None:
        return None
    tracer: Any = proxy.tracer
    if getattr(tracer, "root", None) is module:
        raise RuntimeError(
            f"torch.fx: {type(module).__name__} must be a leaf of the graph, and it is itself what "
            "is traced. Trace a module that holds it, for one torch.nn.Sequential(layer)"
        )
    if why_not := _why_no_leaf(module):
        raise RuntimeError(
            f"torch.fx: {type(module).__name__} must be a leaf of the graph, and {why_not}. Trace "
            "with a torch.fx.Tracer whose is_leaf_module returns True for it"
        )
    args = (input,) if hx is None else (input, hx)
    kwargs = {} if lengths is None else {"lengths": lengths}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _why_no_leaf(module: nn.Module) -> str:
    forward = vars(module).get("forward", type(module).forward)
    if not getattr(forward, "__module__", "").startswith(f"{__package__}."):
        return "it has a forward of its own that calls ours"
    # Those of torch.nn.utils compute a weight; they may do so when it is traced.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if not all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        return "it has hooks, which act on its arguments or results"
    return ""
