# A fresh machine needs two commands: `make quickstart` and `make test`. Each sets up what it needs first.
#
#   make quickstart   set up, then the whole path on embedded multilingual data (three minutes on two idle cores)
#   make test         set up, then lint, types and all tests (about twenty minutes on two cores)
#   make drill        the fault drill with its table (docs/reliability.md), then the other slow tests
#   make format       rewrite the sources in the house format
#
#   PYTHON=python3.11     interpreter of the environment (3.10 or newer)
#   TORCH=installed       use the torch that PYTHON already has, and install no other
#   TORCH_INDEX=URL       package index for torch alone, such as PyTorch's index of CPU builds
#   OUTPUT=DIR            where the quickstart writes
#   NPROC=4               processes of the quickstart
#   FAMILY=mt5            model of the quickstart, an encoder-decoder instead of BLOOM

PYTHON ?= python3
VENV ?= .venv
TORCH ?= pinned
OUTPUT ?= quickstart_output
NPROC ?= 4
FAMILY ?= bloom

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(TORCH)
CONSTRAINTS := $(VENV)/constraints.txt

.PHONY: setup quickstart test lint drill format clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
ifeq ($(TORCH),installed)
	$(PYTHON) -c "import torch; print('using the installed torch', torch.__version__, 'of', torch.__file__)"
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PYTHON) -c "import torch; print('torch==' + torch.__version__)" > $(CONSTRAINTS)
	grep -v -e '^torch==' -e '^triton==' constraints.txt >> $(CONSTRAINTS)
	# A virtual environment made from another one does not see that one's packages by itself.
	$(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)" \
	    > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/installed_torch.pth
else
	$(PYTHON) -m venv $(VENV)
	cp constraints.txt $(CONSTRAINTS)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint $(CONSTRAINTS) torch
endif
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/xmtf quickstart --output $(OUTPUT) --family $(FAMILY) --nproc $(NPROC)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Two halves beside each other: most tests wait for processes of their own, and one after the other they take half as
# long again. The second one's output comes when both are done.
FIRST_HALF ?= tests/training tests/checkpoint tests/models
SECOND_HALF ?= tests $(addprefix --ignore=,$(FIRST_HALF))
SECOND_LOG := $(VENV)/tests_of_the_second_half.log

test: lint
	@$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider $(SECOND_HALF) > $(SECOND_LOG) 2>&1 & second=$$!; \
	$(BIN)/python -m pytest -m "not slow" $(FIRST_HALF); first=$$?; \
	wait $$second; second=$$?; cat $(SECOND_LOG); \
	echo "first half: exit code $$first, second half: exit code $$second"; \
	test $$first -eq 0 -a $$second -eq 0

drill: setup
	$(BIN)/python -m tests.faults.drill; drill=$$?; \
	$(BIN)/python -m pytest -m slow --ignore=tests/faults --deselect tests/data/test_resume.py::test_random_kills && exit $$drill

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
