"""Makes layers and cell modules leaves of the graph in `torch.fx.symbolic_trace`.

torch.nn's modules are leaves. The Tracer traces through all other modules: it calls them with
proxies in place of tensors. If a layer is called in this way, it adds to the graph the node that it
would have as a leaf, and returns the proxy of this node.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["CALL", "as_leaf"]

# nn.Module.__call__ while nothing is traced. A Tracer replaces it while it traces. So if it is this
# function, no argument of a call is a proxy.
CALL = nn.Module.__call__


def as_leaf(
    module: nn.Module,
    input: Any,
    hx: Any = None,
    lengths: Any = None,
    starts: Any = None,
    return_states: bool = False,
) -> Any:
    """Returns a proxy for the result of a call of `module`, or None if no argument is a proxy.

    Raises:
        RuntimeError: the call cannot be a node. Hooks and the forward of a subclass would run
            during the trace and again when the graph runs, and the root of a trace is not a node.
    """
    given = (input, hx, lengths, starts)
    values = [v for a in given for v in (a if isinstance(a, (tuple, list)) else [a])]
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
    kwargs = {"lengths": lengths, "starts": starts, "return_states": return_states or None}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _why_no_leaf(module: nn.Module) -> str:
    """The reason why a module cannot be a leaf; "" if it can."""
    forward = vars(module).get("forward", type(module).forward)
    if not getattr(forward, "__module__", "").startswith(f"{__package__}."):
        return "it has a forward of its own that calls ours"
    # The hooks of torch.nn.utils only compute a weight, which may also happen during the trace.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if not all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        return "it has hooks, which act on its arguments or results"
    return ""
