# One virtual environment, made once for these two files; every target uses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More threads than cores make small models many times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all faults check figures docs gallery rooms gpu clean

demo: $(READY)
	$(BIN)/mdiff demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not faults"

# Kills, faults and hostile files in their long form; figures go to faults.jsonl.
faults: $(READY)
	rm -f faults.jsonl
	MDIFF_FIGURES=faults.jsonl $(BIN)/python -m pytest -m "not gpu" tests/faults

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mdiff
	$(BIN)/python -m pytest -n 2

# The structure of the package in figures: sizes, imports, words, and how fast it starts.
figures: $(READY)
	$(BIN)/python benchmarks/structure.py

# The documentation site, in site/: docs/ and the docstrings. Its pages fetch nothing.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Makes the pictures of docs/gallery.md again, by its commands.
gallery: $(READY)
	$(BIN)/python tests/support/gallery.py

# Draws docs/pictures/rooms.svg, the rooms and their imports.
rooms: $(READY)
	$(BIN)/python tests/support/rooms_drawing.py

# Checks and measures the Triton kernels on the GPU that is here, and writes its figures.
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py

$(READY): pyproject.toml constraints.txt kernels/onepass.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf site $(VENV) build dist kernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
