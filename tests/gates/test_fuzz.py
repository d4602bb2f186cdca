"""Thousands of bad calls: each is refused with an error that names the operator, and none ends the process."""

import json
import subprocess
import sys

import pytest
import torch
from support.calls import NAMESPACE, WITHOUT_SAMPLES, defined_operators
from support.devices import DEVICE, why_not
from support.gates.registration import small_calls
from support.paths import TESTS
from support.samples import CORE
from vitkernels._library import why_no_kernel

BAD_CALLS, GOOD_CALLS = 4800, 400


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
    """Or it is refused whatever its length."""
    calls = {op._schema.name: (op, args) for sample in CORE if not why_not(sample) for op, args in small_calls(sample)}
    for name, (op, args) in calls.items():
        declared = [a.name for a in op._schema.arguments]
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type) and not report["short"].get(f"{name} {argument.name}"):
                given = dict(zip(declared, args, strict=True)) | {argument.name: torch.ones(1, device=DEVICE)}
                with pytest.raises(RuntimeError, match=rf"{argument.name} .*takes (None|uint8|\()"):
                    op(**given)


def test_every_operator_was_called(report):
    assert sum(report["bad"].values()) >= 2000
    for schema in defined_operators():
        if why_no_kernel(schema.name.removeprefix(f"{NAMESPACE}::"), DEVICE.type) or schema.name in WITHOUT_SAMPLES:
            continue
        # A function of two forms shares its calls between their operators.
        count = sum(count for key, count in report["bad"].items() if f" {schema.name} " in key)
        assert count >= 50, schema.name
