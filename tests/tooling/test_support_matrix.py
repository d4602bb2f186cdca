"""docs/support.md is what the calls of the sample table find today."""

import pytest
from support.devices import ON_CPU

from tools import support_matrix


@pytest.mark.skipif(not ON_CPU, reason="the page is about the CPU's kernels, and names those of a GPU")
def test_page_is_up_to_date():
    found, written = support_matrix.page(), support_matrix.PAGE.read_text()
    assert written == found, f"{support_matrix.PAGE}: run python -m tools.support_matrix"
