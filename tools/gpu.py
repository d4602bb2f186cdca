"""Build, test, check and measure on a machine with a GPU: what ``make gpu`` runs.

Uses the interpreter that runs it, which has torch with CUDA, and needs no network. A stage has a time limit and a log
of its own; a later one runs even if an earlier one failed. VITKERNELS_LIBRARY and VITKERNELS_CUDA_LIBRARY name
libraries that were built elsewhere; without them both are built here, for this GPU only.

    python3 tools/gpu.py                                  # build, test, memcheck, racecheck, bench
    python3 tools/gpu.py build test --limit test=300
    python3 tools/gpu.py yardstick                        # what others reach on this GPU; needs nothing of ours
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # packages that the interpreter lacks, from the wheels in .whl/
LIBRARY, CUDA_LIBRARY = "VITKERNELS_LIBRARY", "VITKERNELS_CUDA_LIBRARY"

# Gates that run on any device, longest first, then the tests that need a GPU.
TESTS = (
    "gates/test_compile", "gates/test_registration", "gates/test_properties", "gates/test_layout",
    "gates/test_reference", "cuda/test_gpu", "gates/test_autocast", "gates/test_determinism", "gates/test_fuzz",
    "gates/test_gradcheck", "gates/test_errors",
)  # fmt: skip
#: Seconds; the sum stays below nine minutes.
LIMITS = {"build": 210, "test": 140, "memcheck": 35, "racecheck": 35, "bench": 115, "yardstick": 115}
DEFAULT = tuple(stage for stage in LIMITS if stage != "yardstick")

Command = list[str]


@dataclass
class Result:
    stage: str
    state: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.state not in ("ok", "skipped")


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def environment() -> dict[str, str]:
    """The environment of every command: paths of the sources and extra packages, names of the libraries."""
    paths = [str(ROOT / "python"), str(ROOT / "tests"), str(SITE), os.environ.get("PYTHONPATH", "")]
    built = {LIBRARY: str(BUILD / "libvitkernels_cpu.so")}
    for path in BUILD.glob("libvitkernels_cuda[0-9]*.so"):
        built[CUDA_LIBRARY] = str(path)
    return {**built, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def architecture() -> str:
    """The compute capability of the first GPU, as in ``90``."""
    code = "import torch; print(''.join(map(str, torch.cuda.get_device_capability())))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def build_commands() -> Iterator[Command]:
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        install = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target"]
        yield [sys.executable, "-m", *install, str(SITE), *wheels]
    given = {name for name in (LIBRARY, CUDA_LIBRARY) if name in os.environ}
    if given == {LIBRARY, CUDA_LIBRARY}:
        return
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    cuda = "OFF" if CUDA_LIBRARY in given else "ON"
    yield [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DVITKERNELS_CUDA={cuda}",
        f"-DVITKERNELS_CUDA_ARCHITECTURES={architecture()}",
    ]  # fmt: skip
    target = ["--target", "vitkernels_cuda"] if LIBRARY in given else []
    yield ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count()), *target]


def test_commands(out: Path) -> Iterator[Command]:
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}", "-o", "faulthandler_timeout=60"]
    if has("xdist"):  # a kernel that makes the device useless ends one worker, not the run
        options += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    if has("pytest_timeout"):
        options += ["--timeout", "100", "--timeout-method", "thread"]
    yield [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / f"{name}.py") for name in TESTS)]


def sanitizer_commands(tool: str) -> Iterator[Command]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # The namespace is part of our kernels' names: PyTorch's kernels and driver calls are not checked.
    options += ["--kernel-name", "kernel_substring=vitkernels"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    yield [sanitizer, *options, sys.executable, "-m", "support.smallest_calls"]


def bench_commands(out: Path, *options: str) -> Iterator[Command]:
    module = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--only", "gpu/*", "--no-plots"]
    yield [*module, "--out", str(out), *options]


def commands(stage: str, out: Path) -> Iterator[Command]:
    """The commands of a stage, in order; none if it has nothing to do."""
    if stage == "build":
        return build_commands()
    if stage == "test":
        return test_commands(out)
    if stage in ("memcheck", "racecheck"):
        return sanitizer_commands(stage)
    if stage == "yardstick":
        return bench_commands(out / stage, "--peers-only")
    return bench_commands(out, "--flex")


def variables(stage: str) -> dict[str, str]:
    if stage not in ("test", "memcheck", "racecheck"):
        return {}
    # One allocation for each tensor, so that the checker knows where it ends.
    cache = {} if stage == "test" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {"VITKERNELS_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1", **cache}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop it and its children, after a moment in which it may write what it has."""
    for how, seconds in ((signal.SIGINT, 8), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
            process.wait(seconds)
            if how == signal.SIGKILL:
                return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def run(command: Command, log: Path, environment: dict[str, str], seconds: float) -> str:
    """``"ok"``, the exit status, or that it took too long."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"not started: {error}"
        try:
            status = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            stop(process)
            return "timed out"
        except BaseException:
            stop(process)
            raise
    return "ok" if status == 0 else f"exit status {status}"


def run_stage(stage: str, out: Path, limit: float) -> Result:
    log, start, state = out / f"{stage}.log", time.monotonic(), "skipped"
    log.write_bytes(b"")
    try:
        for command in commands(stage, out):
            state = run(command, log, environment() | variables(stage), limit - (time.monotonic() - start))
            if state != "ok":
                break
    except (OSError, subprocess.SubprocessError) as error:
        state = f"failed: {error}"
    return Result(stage, state, round(time.monotonic() - start, 1))


def tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def report(results: list[Result], out: Path) -> None:
    """Print how the last stage ended, and write how all ended."""
    last = results[-1]
    print(f"--- {last.stage}: {last.state}, {last.seconds} s", flush=True)
    print(tail(out / f"{last.stage}.log", 40 if last.failed else 15), flush=True)
    (out / "stages.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(LIMITS)}; default: all but the last")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-out", help="folder of logs and results")
    parser.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args(argv)
    arguments.limits = {**LIMITS, **{n: float(s) for n, _, s in (text.partition("=") for text in arguments.limit)}}
    unknown = ({*arguments.stages} | {*arguments.limits}) - {*LIMITS}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(LIMITS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 1 if one failed."""
    arguments = parse(argv)
    stages, out = arguments.stages or DEFAULT, arguments.out.resolve()
    if arguments.dry_run:
        print("\n".join(" ".join(command) for stage in stages for command in commands(stage, out)))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for stage in stages:
        results.append(run_stage(stage, out, arguments.limits[stage]))
        report(results, out)
        if stage == "bench" and results[-1].failed and "yardstick" not in stages:
            # One of our kernels may have ended it: the peers' figures on this GPU are still worth having.
            results.append(run_stage("yardstick", out, arguments.limits["yardstick"]))
            report(results, out)
    print("\n".join(["", *(f"{r.stage:<10} {r.seconds:>7.1f} s  {r.state}" for r in results)]))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main())
