"""Thousands of bad calls: each is refused with an error that names the operator, and none ends the process."""

import json
import subprocess
import sys

import pytest
from support.calls import NAMESPACE, defined_operators
from support.devices import DEVICE
from support.paths import TESTS
from vitkernels._library import why_no_kernel

BAD_CALLS, GOOD_CALLS = 4000, 400


@pytest.fixture(scope="module")
def report():
    # A process of its own, with this one's environment: a sanitized library is tested the same way.
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "support.fuzz_worker",
        str(BAD_CALLS),
        str(GOOD_CALLS),
        "20261121",
    ]
    ran = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert ran.returncode == 0, f"the process ended with {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return json.loads(ran.stdout.splitlines()[-1])


def test_bad_calls_are_refused(report):
    assert not report["wrong"], f"{len(report['wrong'])} calls:\n" + "\n".join(report["wrong"][:20])


def test_every_argument_was_too_short(report):
    """Tensors whose length others decide: all but what an operator may have in any length."""
    for schema in defined_operators():
        if why_no_kernel(schema.name.removeprefix(f"{NAMESPACE}::"), DEVICE.type):
            continue
        tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        missing = {name for name in tensors if not report["short"].get(f"{schema.name} {name}")}
        assert not missing, f"{schema.name}: {missing}"


def test_every_operator_was_called(report):
    assert sum(report["bad"].values()) >= 2000
    for schema in defined_operators():
        if why_no_kernel(schema.name.removeprefix(f"{NAMESPACE}::"), DEVICE.type):
            continue
        assert sum(count for key, count in report["bad"].items() if f" {schema.name} " in key) >= 100, schema.name
