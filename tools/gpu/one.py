"""Calls one layer a few times, for ncu, compute-sanitizer and torch's profiler.

python -m tools.gpu.one --cell lstm --precision bf16 --shape 30,32,1024,1024 --calls 2 [--profile]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import fusedrnn
from fusedrnn import _console

DTYPES = {
    "f32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
LAYERS = {
    "lstm": (fusedrnn.FusedLSTM, nn.LSTM),
    "gru": (fusedrnn.FusedGRU, nn.GRU),
    "rnn": (fusedrnn.FusedRNN, nn.RNN),
}
PROFILED = 5
SHOWN = 9


def layer_call(options: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that calls a layer forward and backward."""
    T, N, I, H = map(int, options.shape.split(","))
    dtype, device = DTYPES[options.precision], options.device
    torch.manual_seed(0)
    kind = LAYERS[options.cell][options.torch]
    layer = kind(I, H, bidirectional=options.bidirectional, device=device, dtype=dtype)
    x = torch.randn(T, N, I, device=device).to(dtype).requires_grad_()
    lengths: dict[str, Any] = {}
    if options.lengths:
        lengths = {"lengths": [max(1, T - 2 * n % T) for n in range(N)]}

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x, **lengths)[0].sum().backward()

    return call


TIMES: dict[str, Callable[[Any], float]] = {
    "device": lambda event: event.self_device_time_total,
    "host": lambda event: event.self_cpu_time_total,
}


def events_of(events: Iterable[Any], where: str) -> list[Any]:
    """The events that took time on the device or on the host, each kernel once.

    An op's event on the host includes the time of its kernels, which have events of their own, so
    the device's events leave it out. The host's events leave out waiting for the device.
    """
    host = torch.autograd.DeviceType.CPU
    if where == "device":
        return [
            e
            for e in events
            if e.device_type != host and not getattr(e, "is_user_annotation", False)
        ]
    waits = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
    return [e for e in events if e.device_type == host and e.key not in waits]


def profile(call: Callable[[], None], name: str, cuda: bool) -> None:
    """Prints where a call's time goes, on the device and on the host."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(PROFILED):
            call()
        if cuda:
            torch.cuda.synchronize()
    for where in ("device", "host") if cuda else ("host",):
        events = events_of(found.key_averages(), where)
        time_of = TIMES[where]
        total = sum(map(time_of, events)) / PROFILED
        print(f"{name}: {total:.0f} us a call on the {where}")
        for event in sorted(events, key=time_of, reverse=True)[:SHOWN]:
            each = f"{time_of(event) / PROFILED:8.1f} us {event.count / PROFILED:6.1f} times"
            print(f"  {each}  {event.key[:90]}")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.one", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cell", choices=LAYERS, default="lstm")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--shape", default="30,32,1024,1024", metavar="T,N,I,H")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--lengths", action="store_true", help="sequences of several lengths")
    parser.add_argument("--torch", action="store_true", help="torch.nn's layer instead of ours")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    tf32 = options.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    cuda = options.device.startswith("cuda")
    call = layer_call(options)
    for _ in range(options.calls):
        call()
    if cuda:
        torch.cuda.synchronize()
    if options.profile:
        profile(call, f"{options.cell} {options.precision} {options.shape}", cuda)
    print("done")
    return 0


if __name__ == "__main__":
    _console.run(main)
