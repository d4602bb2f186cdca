"""Mechanisms of the literature, written with the package's calls and with the paper's own formula.

Each test states a mechanism twice and compares results and gradients. docs/mechanisms.md names the tests. The
formulas work on all tokens at once and mask the pairs that a mechanism leaves out.
"""

import re

from support.paths import ROOT, TESTS


def test_the_table_names_these_tests():
    page = ROOT / "docs" / "mechanisms.md"
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    sources = "".join(path.read_text() for path in (TESTS / "mechanisms").glob("test_*.py"))
    written = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE)) - {"test_the_table_names_these_tests"}
    assert named == written
