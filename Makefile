# make demo, make test, make bench: each sets up everything it needs in .venv and runs. No root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU builds of torch are pinned: a plain "torch" brings gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench check-speed clean

demo: $(VENV)/demo.stamp
	$(BIN)/robustkern demo

test: $(VENV)/dev.stamp
	ROBUSTKERN_REQUIRE=cpp,numba $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest bench -o python_files="bench_*.py" -o timeout=0 --benchmark-only --benchmark-columns=median,min,max,rounds --benchmark-group-by=group $(ARGS)

check-speed: $(VENV)/dev.stamp
	$(BIN)/python bench/check.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The build system is installed beside the package so that editable rebuilds need no network.
$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	RK_REQUIRE_EXTENSION=1 $(BIN)/python -m pip install --quiet --editable '.[dev]' --config-settings=cmake.define.RK_WERROR=ON
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) build demo-output
