# Each target makes the virtual environment .venv first, with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-ocr test torture hostile deepspeed check fix clean

demo: $(VENV)/ready
	$(BIN)/python sample_data/demo.py

demo-ocr: $(VENV)/ready
	$(BIN)/python sample_data/ocr/demo.py

# A process per core, a thread each.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --dist worksteal

torture: $(VENV)/ready
	$(BIN)/pytest tests/test_torture.py tests/test_torture_outputs.py --kills 60
	$(BIN)/pytest tests/test_data_fuzz.py --records 20000

hostile: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_hostile.py --mutations 3000 --numprocesses logical

# Two processes with DeepSpeed, which vlft does not need otherwise.
deepspeed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	$(BIN)/pytest tests/test_zero.py

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) output .pytest_cache .mypy_cache .ruff_cache

# torch first: on its own line, so that no other package chooses its build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
