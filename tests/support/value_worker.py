"""Makes the calls with values out of range on emulated CUDA kernels; ``test_emulator_attention`` runs this.

In a process of its own, since the environment and the GPU are read once. Prints the errors, ``null`` for none, as JSON.

    python -m support.value_worker COMPUTE_CAPABILITY
"""

import json
import sys

from support.calls import replace
from support.emulation import Emulator
from support.gates.errors import VALUE_ERRORS

emulator = Emulator()
emulator.configure(compute_capability=int(sys.argv[1]))
errors = []
with emulator.on_cpu_tensors():
    for function, call, _ in VALUE_ERRORS:
        try:
            function(**replace(call, lambda t: t.bfloat16() if t.is_floating_point() else t.clone()))
            errors.append(None)
        except RuntimeError as error:
            errors.append(str(error))
print(json.dumps(errors))
