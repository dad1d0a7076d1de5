"""Counts the instructions of the resident kernels: python -m tests.cuda.instructions."""

from __future__ import annotations

from tests.kit import build
from tests.kit.device import Device
from tests.kit.device_cases import DeviceCase, run_on

CASES = (
    DeviceCase("lstm", 4, 16, 64, 64, 1, True, (4,) * 20),
    DeviceCase("lstm", 16, 16, 64, 64, 1, True, (16,) * 20, "bf16"),
)


class CountingDevice(Device):
    """Prints how many instructions each resident launch takes."""

    def launch(self, kernel: str, *args: object) -> None:  # type: ignore[override]
        before = self.instructions
        super().launch(kernel, *args)  # type: ignore[arg-type]
        if kernel.startswith("resident"):
            print(f"{kernel:32} {self.instructions - before:,}")


if __name__ == "__main__":
    for case in CASES:
        run_on(case, CountingDevice(build.ptx(80), seed=0), regime="resident")
