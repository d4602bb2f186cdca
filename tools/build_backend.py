"""scikit-build-core, which first looks for torch.

CMake does so too, but too late: from the metadata pip learns what the package requires at run time, and downloads it,
torch with gigabytes of CUDA packages, before it builds.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  the hooks that a build frontend calls


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            f"vitkernels needs torch >= 2.10 to build, and {sys.executable} sees none. An isolated build sees none "
            "where one is installed, too, and should not download another. From a clone:\n"
            '    pip install torch scikit-build-core "cmake>=3.25" ninja\n'
            "    pip install --no-build-isolation ."
        )


def prepare_metadata_for_build_wheel(*args: Any, **kwargs: Any) -> str:
    _require_torch()
    return build.prepare_metadata_for_build_wheel(*args, **kwargs)


def prepare_metadata_for_build_editable(*args: Any, **kwargs: Any) -> str:
    _require_torch()
    return build.prepare_metadata_for_build_editable(*args, **kwargs)
