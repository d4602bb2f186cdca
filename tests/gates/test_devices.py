"""That the functions and their references make nothing on another device than their arguments'."""

import pytest
import torch
from support.calls import differentiate, replace
from support.samples import each_small_sample


@each_small_sample
@pytest.mark.parametrize("which", ["function", "reference"])
def test_everything_stays_on_the_device(sample, which):
    """A tensor made on the CPU by mistake does not mix with those of the meta device, nor with a GPU's."""
    if which == "reference" and sample.operator.endswith("_varlen"):
        pytest.skip("reads its offsets on the host")
    call = replace(sample.call(torch.float32, sizes=sample.small()), lambda t: t.to("meta"))
    outputs, grads = differentiate(getattr(sample, which), call)
    assert all(t.device.type == "meta" for t in outputs + grads)
