"""The stages of ``make gpu``, as far as a machine without a GPU can run them."""

import json
import sys
import time
from pathlib import Path

from support import smallest_calls
from support.paths import ROOT, SUPPORT

from tools import gpu


def python(code):
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_or_hangs_costs_itself_alone(monkeypatch, tmp_path, capsys):
    """Its children end with it, the next stage runs, and the exit status tells."""
    child = "import time; time.sleep(60)"
    stages = {
        "build": [python("print('built')"), python("print('and linked')")],
        "test": [python("import sys; print('one test failed'); sys.exit(3)"), python("print('not reached')")],
        "memcheck": [python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}'])")],
        "racecheck": [],
        "bench": [["/nowhere/program"]],
        "yardstick": [python("import os; print(os.environ['PYTHONPATH'])")],
    }
    monkeypatch.setattr(gpu, "commands", lambda stage, out: iter(stages[stage]))
    begun = time.monotonic()
    status = gpu.main(["--out", str(tmp_path), "--limit", "memcheck=1.5"])
    assert time.monotonic() - begun < 30
    assert status == 1
    states = {r["stage"]: r["state"] for r in json.loads((tmp_path / "stages.json").read_text())}
    assert list(states) == list(stages), "the yardstick is measured where the benchmarks failed"
    assert (states["build"], states["test"], states["racecheck"]) == ("ok", "exit status 3", "skipped")
    assert states["memcheck"] == "timed out" and states["bench"].startswith("not started")
    assert "and linked" in (tmp_path / "build.log").read_text()
    assert "not reached" not in (tmp_path / "test.log").read_text()
    assert str(ROOT / "python") in (tmp_path / "yardstick.log").read_text()
    assert "one test failed" in capsys.readouterr().out


def test_success_is_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "commands", lambda stage, out: iter([python("print(1)")]))
    assert gpu.main(["build", "test", "--out", str(tmp_path)]) == 0


def test_prebuilt_libraries_are_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # no wheels there
    monkeypatch.setattr(gpu, "architecture", lambda: "90")
    for name in (gpu.LIBRARY, gpu.CUDA_LIBRARY):
        monkeypatch.delenv(name, raising=False)
    configure, build = gpu.build_commands()
    assert "-DVITKERNELS_CUDA=ON" in configure and "-DVITKERNELS_CUDA_ARCHITECTURES=90" in configure
    assert "--target" not in build
    monkeypatch.setenv(gpu.CUDA_LIBRARY, "/elsewhere/libvitkernels_cuda13.so")
    configure, build = gpu.build_commands()
    assert "-DVITKERNELS_CUDA=OFF" in configure
    assert gpu.environment()[gpu.CUDA_LIBRARY] == "/elsewhere/libvitkernels_cuda13.so"
    monkeypatch.setenv(gpu.LIBRARY, "/elsewhere/libvitkernels_cpu.so")
    assert list(gpu.build_commands()) == []
    assert gpu.environment()[gpu.LIBRARY] == "/elsewhere/libvitkernels_cpu.so"


def test_what_is_run_exists(tmp_path):
    """Every file that a command names, and every test file that runs on any device."""
    (command,) = gpu.test_commands(tmp_path)
    files = [Path(word) for word in command if word.endswith(".py")]
    assert files and all(file.exists() for file in files)
    assert (SUPPORT / "smallest_calls.py").exists()
    assert sum(gpu.LIMITS[stage] for stage in gpu.DEFAULT) < 9 * 60


def test_smallest_calls_run():

    assert smallest_calls.run() > 10
