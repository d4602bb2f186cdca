"""No N x N matrix: at 8192 tokens one alone would take 268 MB in float32."""

import subprocess
import sys

from support.paths import TESTS
from support.samples import each_tagged

TOKENS = 8192
MEGABYTES = 64

MEASURE = """
import resource, sys, torch
from support.calls import differentiate
from support.samples import SAMPLES
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sample = next(s for s in SAMPLES if str(s) == sys.argv[1])
sizes = {"b": 1, "h": 1, "g": 1, "d": 8, "v": 8}
differentiate(sample.function, sample.call(torch.float32, sizes={**sizes, "q": 64, "k": 64}))
before = peak()
for tokens in (int(sys.argv[2]) // 2, int(sys.argv[2])):
    grid = {"y": 64, "x": tokens // 64} if "y" in sample.sizes else {"x": tokens}
    differentiate(sample.function, sample.call(torch.float32, sizes={**sizes, **grid, "q": tokens, "k": tokens}))
    print(peak() - before)
"""


@each_tagged("linear-memory")
def test_peak_memory(sample):
    command = [sys.executable, "-c", MEASURE, str(sample), str(TOKENS)]
    ran = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    half, full = map(float, ran.stdout.split())
    assert full < MEGABYTES
    assert full < 3 * half + 16, "faster than linear"
