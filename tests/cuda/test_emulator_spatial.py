"""Attention over maps with any pattern on a GPU: agreement with float64 on the rows of the sample table."""

import pytest
from support.devices import ON_TENSOR_CORES
from support.emulation import needs_emulator
from support.error_policy import check_sample
from support.samples_spatial import SPATIAL_SAMPLES

pytestmark = needs_emulator


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("sample", SPATIAL_SAMPLES, ids=str)
def test_samples(sample, dtype, cuda_kernels):
    check_sample(sample, dtype)
