# make demo, make test, make bench, make docs, make wheel: each sets up everything it needs in .venv and runs. No root. The CUDA backend is built
# where there is a CUDA compiler; its kernels are tested on the processor, so that it takes no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU builds of torch are pinned: a plain "torch" brings gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
# Without what it merges models with (transformers, datasets and some hundred more): its merge methods need none of it.
MERGEKIT ?= mergekit==0.1.5
# Backends and what else tests may not skip; jax-ffi: JAX's calls without callbacks; cuda-static (the compiled CUDA kernels) needs a CUDA compiler, cuda a GPU.
REQUIRE ?= cpp,numba,cuda-emulated,jax-ffi,fuzzer,$(subst $(space),$(comma),$(WATCHED:%=watched-%) $(EMULATED:%=emulated-%))$(if $(shell command -v nvcc),$(comma)cuda-static)
# Processes that run tests side by side.
WORKERS ?= 2
comma := ,
space := $() $()
SOURCES := pyproject.toml CMakeLists.txt packaging/build_backend.py $(shell find csrc -type f -not -path "csrc/emulation/*")

COUNTED := $(patsubst %,tests/test_%.py,kernels momenta means blocks rules registry arrays leaves files workers benchmark)
CLANG_FORMATTED = $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
EMULATIONS := $(patsubst %,build/emulation/%/built,plain address thread)
# Which builds the tests watch, of the kernels for the CPU (build/watched) and of the emulated ones; make check-all: all.
WATCHED ?= address
EMULATED ?= address

# All that `make test` compiles and installs.
BUILDS := $(VENV)/dev.stamp $(patsubst %,build/emulation/%/built,plain $(EMULATED)) $(WATCHED:%=build/watched/%/built)

.PHONY: demo builds test lint format bench bench-compare check-speed docs wheel reproduction emulation gpu-report clean \
	fuzz soak mutation coverage check-all

demo: $(VENV)/demo.stamp
	$(BIN)/robustkern demo

# Two at a time: much of each waits for a download or for one large file.
builds:
	@$(MAKE) --no-print-directory --jobs=2 $(BUILDS)

# OpenMP's threads do not spin while they wait: beside the other process's that took a third of the time of tests of kernels.
test: builds
	OMP_WAIT_POLICY=passive ROBUSTKERN_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMATTED)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest bench -o python_files="bench_*.py" -o timeout=0 --benchmark-only --benchmark-columns=median,min,max,rounds --benchmark-group-by=group $(ARGS)

# make bench-compare BEFORE=old.json AFTER=new.json, each of `make bench ARGS=--benchmark-json=...` or `robustkern bench --save`.
bench-compare: $(VENV)/dev.stamp
	$(BIN)/robustkern bench --compare $(BEFORE) $(AFTER) $(ARGS)

check-speed: $(VENV)/dev.stamp
	$(BIN)/python bench/check.py

# An hour of each of what follows; findings are left in build/fuzz.
fuzz: $(VENV)/dev.stamp
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),450) $(ARGS)

soak: $(VENV)/dev.stamp
	$(BIN)/python tests/soak.py --minutes $(or $(MINUTES),60) $(ARGS)

# Faults planted in rules and kernels, and how many the tests catch.
mutation: $(VENV)/dev.stamp
	$(BIN)/python tests/mutation.py --count $(or $(COUNT),60) --least 0.4 $(ARGS)

# Lines and branches that the tests reach: of the CPU kernels, and of all that is Python.
coverage: $(VENV)/dev.stamp build/watched/coverage-levels/built
	ROBUSTKERN_WATCHED=coverage-levels $(BIN)/python -m pytest -q -k "not numba and not emulated and not planted and not versions_agree" $(COUNTED)
	$(BIN)/gcovr --root . --filter csrc --exclude-throw-branches --merge-lines build/watched/coverage-levels
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --cov=robustkern --cov-branch --cov-report=term $(ARGS)

# Everything that can be checked here, for hours: every sanitizer at every instruction set, and all of the above.
check-all: lint check-speed
	$(MAKE) test WATCHED="address address-levels thread" EMULATED="address thread"
	$(MAKE) fuzz soak mutation coverage docs wheel

# The site, into build/docs; runs the gallery's scripts where they changed.
docs: $(VENV)/dev.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

# A wheel for this Python that runs on other Linux machines, into dist.
wheel: $(VENV)/dev.stamp
	$(BIN)/python packaging/wheel.py dist

# The paper's comparisons, and the page about them; goes on where it was stopped.
reproduction: $(VENV)/dev.stamp
	$(BIN)/robustkern reproduce --out build/reproduction
	cp build/reproduction/reproduction.md build/reproduction/reproduction-*.png docs/

# The CUDA kernels for this processor: as they are, and with the address and the thread sanitizer.
emulation: $(EMULATIONS)

build/emulation/%/built: $(VENV)/tools.stamp $(SOURCES) $(wildcard csrc/emulation/*)
	@echo "compiling the CUDA kernels for this processor ($*), some minutes"
	$(call compile,-DRK_EMULATION=$*)

# The CPU kernels, watched or counted (address, thread, coverage): those that every processor runs, or -levels: all.
build/watched/%/built: $(VENV)/tools.stamp $(SOURCES)
	@echo "compiling the CPU kernels to be watched ($*), some minutes"
	$(call compile,-DRK_WATCH=$(firstword $(subst -, ,$*)) -DRK_X86_LEVELS=$(if $(findstring levels,$*),ON,OFF))

# MAKEFLAGS= wherever something is compiled: Ninja would ask for processors at make's job server, which it cannot reach.
define compile
$(BIN)/cmake -S . -B $(@D) -G Ninja --log-level=WARNING -DSKBUILD_PROJECT_VERSION=0 -DRK_WERROR=ON $(1) \
	-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	-Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
MAKEFLAGS= $(BIN)/cmake --build $(@D) -- --quiet
touch $@
endef

# On a machine with an NVIDIA GPU: build, tests, compute-sanitizer and the scaling study, into gpu-report/report.md.
gpu-report: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet cupy-cuda13x
	$(BIN)/python bench/gpu_report.py $(ARGS)

$(VENV)/bin/python:
	@echo "making $(VENV), where everything below goes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# What compiles.
$(VENV)/tools.stamp: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet cmake ninja nanobind
	touch $@

# The build system is installed beside the package so that editable rebuilds need no network.
$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	@echo "installing robustkern and what the demo needs: compiles the kernels, a few minutes the first time"
	MAKEFLAGS= RK_CUDA=$(if $(wildcard /dev/nvidia0),AUTO,OFF) $(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

# Packages first, without compiling, which keeps one processor busy: at the end nothing would be left for the others.
$(VENV)/dev.stamp: $(VENV)/tools.stamp $(SOURCES)
	@echo "installing $(TORCH) for the processor, some 200 MB"
	$(BIN)/python -m pip install --quiet $(TORCH)
	@echo "installing what robustkern, its tools and its tests take"
	$(BIN)/python -m pip install --quiet '.[dev]' --config-settings=wheel.cmake=false
	$(BIN)/python -m pip install --quiet --no-deps $(MERGEKIT)
	@echo "installing robustkern: compiles the kernels, some minutes"
	MAKEFLAGS= RK_JAX=ON RK_REQUIRE_EXTENSION=1 $(BIN)/python -m pip install --quiet --no-deps --editable . --config-settings=cmake.define.RK_WERROR=ON
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) build dist docs/made demo-output train-output reproduction
