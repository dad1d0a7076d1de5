"""The instruction sets that the tests of kernels run on."""

from __future__ import annotations

import pytest

from tests.kit.build import native

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    missing = native().isas()[request.param]
    if missing:
        pytest.skip(f"{request.param}: {missing}")
    return request.param
