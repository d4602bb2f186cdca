"""Calls every operator thousands of times with arguments that it must refuse; ``test_fuzz`` runs this file.

Where the calls come from: the samples, and below their functions the operators that these call, backward included. One
argument of a call is spoiled in a way that is certainly wrong. What should be refused and is not, or with
an error that does not say which operator, is printed; a crash ends the process.

    python fuzz_worker.py BAD_CALLS GOOD_CALLS SEED
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from calls import differentiate, outputs_of, replace, tensors
from samples import SMALL_SAMPLES, Sample
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# No two dimensions of a call share a length by chance: a length that two tensors have is one that must agree.
SIZES = {"b": 5, "q": 11, "k": 13, "d": 17, "v": 19, "a": 23}
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
NOT_TENSORS = [None, "text", 3, object(), [], {}]
