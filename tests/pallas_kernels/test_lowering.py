"""Every kernel at the sizes of the real models lowers for AMD GPUs, with plain JAX."""

import pytest

from pallas_kernels.rocm.cases import ZAYA1_8B, ZAYA1_74B, cases
from pallas_kernels.rocm.lowering import lower, traffic

CASES = [pytest.param(c, id=f"{c.name} {s.name}") for s in (ZAYA1_8B, ZAYA1_74B) for c in cases(s)]


@pytest.mark.parametrize("case", CASES)
def test_it_lowers_for_rocm(case):
    text = lower(case.kernels, *case.args).as_text()
    for kernel in traffic(case.kernels, *case.args):
        assert kernel.name in text and "__gpu$xla.gpu.triton" in text
