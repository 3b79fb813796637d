# Each target makes the virtual environment .venv first, with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-ocr demo-draw test test-all torture hostile deepspeed gpu gpu-tests gpu-steps gpu-attention gpu-peers gpu-command
.PHONY: check fix clean options pictures docs dist test-newest test-oldest

demo: $(VENV)/ready
	$(BIN)/vlft demo

demo-ocr: $(VENV)/ready
	$(BIN)/python sample_data/ocr/demo.py

demo-draw: $(VENV)/ready
	$(BIN)/python sample_data/draw/demo.py

# A process per core, a thread each.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --dist worksteal

# With what takes over a minute: notebooks, site, wheel.
test-all: test docs dist
	$(BIN)/pytest tests/test_notebooks.py --notebooks

torture: $(VENV)/ready
	$(BIN)/pytest tests/test_torture.py tests/test_torture_outputs.py --kills 60
	$(BIN)/pytest tests/test_data_fuzz.py --records 20000

hostile: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_hostile.py --mutations 3000 --numprocesses logical

# Two processes with DeepSpeed, which vlft does not need otherwise.
deepspeed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	$(BIN)/pytest tests/test_zero.py

# The proof on one GPU, without network: 25 minutes in five pieces, each usable alone. Figures are
# written as soon as they are there; what eight minutes do not suffice for is left out. On a machine
# without a GPU make gpu DEVICE=cpu runs all of it in a reduced form, as a test of the code alone.
# gpu-peers needs TRL: pip install trl==1.16.0 into the virtual environment.
DEVICE ?= cuda
ifeq ($(DEVICE),cpu)
RESULTS := output/gpu
LIMIT := 1h
REDUCED := --scale tiny
STEP_OPTIONS := $(REDUCED) --samples 3 --repeats 1
COMMAND_OPTIONS := $(REDUCED) --models 1.3b --images 10 --steps 3
ATTENTION_OPTIONS := --tokens 1024 --heads 2x32 2x48/32 --repeats 1
EXPERTS_OPTIONS := --tokens 16 --repeats 1
PEERS_OPTIONS := $(REDUCED) --samples 4 --epochs 1 --workloads q1 q5
else
RESULTS := benchmarks/results
LIMIT := 8m
ATTENTION_OPTIONS := --tokens 2048 8192 16384 --heads 32x128 16x192/128 --dtype bfloat16
PEERS_OPTIONS := --scale deepseek-vl-1.3b-chat --dtypes bfloat16 --workloads q1 q5 q2 mixed
endif
PIECE := timeout $(LIMIT) $(BIN)/python -m benchmarks
LATE := || [ $$? = 124 ]

# A piece that fails does not keep the others from running.
gpu: $(VENV)/ready
	$(MAKE) --keep-going gpu-tests gpu-steps gpu-command gpu-attention gpu-peers

gpu-tests: $(VENV)/ready
	timeout $(LIMIT) $(BIN)/pytest tests/test_cuda.py --device $(DEVICE)

gpu-steps: $(VENV)/ready
	$(PIECE) step --device $(DEVICE) $(STEP_OPTIONS) --output $(RESULTS)/gpu-steps $(LATE)

gpu-attention: $(VENV)/ready
	$(PIECE) attention --device $(DEVICE) $(ATTENTION_OPTIONS) --output $(RESULTS)/gpu-attention $(LATE)
	$(PIECE) experts --device $(DEVICE) $(EXPERTS_OPTIONS) --output $(RESULTS)/gpu-experts $(LATE)

gpu-peers: $(VENV)/ready
	$(PIECE) peers --device $(DEVICE) $(PEERS_OPTIONS) --output $(RESULTS)/gpu-peers $(LATE)

gpu-command: $(VENV)/ready
	$(PIECE) product --device $(DEVICE) $(COMMAND_OPTIONS) --output $(RESULTS)/gpu-command $(LATE)

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/options.md, from the settings' dataclasses; a test compares them.
options: $(VENV)/ready
	$(BIN)/python docs/make_options.py

# docs/images: the terminal of a real run, and the plot of the measured speed.
pictures: $(VENV)/ready
	$(BIN)/python docs/make_pictures.py

# The pages of docs/ as a site, in output/site; a warning is an error.
docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# sdist and wheel; the wheel is installed away from the repository, and its demo runs there.
DIST := .venv-dist
dist: $(VENV)/ready
	rm -rf dist $(DIST)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(DIST)/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd $$(mktemp -d) && $(CURDIR)/$(DIST)/bin/vlft demo --quick

# The suite with the newest versions of all but torch, whose build constraints.txt chooses.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/torch.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/torch.txt --upgrade --editable '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest --numprocesses logical --dist worksteal

# The lowest versions that pyproject.toml allows, again but for torch: the tests of every family.
OLDEST := .venv-oldest
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	grep '^torch==' constraints.txt > $(OLDEST)/torch.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(OLDEST)/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install --quiet --resolution lowest-direct \
		--override $(OLDEST)/torch.txt --editable '.[dev]'
	# Old releases warn of packages that are newer.
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest --numprocesses logical -W ignore::DeprecationWarning \
		tests/test_golden.py tests/test_merge.py tests/test_lora.py tests/test_infer.py tests/test_cli.py

clean:
	rm -rf $(VENV) $(DIST) $(NEWEST) $(OLDEST) dist output .pytest_cache .mypy_cache .ruff_cache

# torch first: on its own line, so that no other package chooses its build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
