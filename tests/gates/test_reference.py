"""Every sample against its definition, in every dtype, within the error policy."""

import pytest
from support.error_policy import FLOOR, check_sample
from support.samples import each_sample


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@each_sample
def test_error_policy(sample, dtype):
    check_sample(sample, dtype)
