# `make` or `make test` on a bare machine is enough: the environment is built first, and again when pyproject.toml changes.
#
#   TORCH   what pip installs as torch, before everything else, e.g. TORCH="torch>=2.8" on macOS or Windows
#   PYTHON  the interpreter that .venv is made with, 3.11 to 3.13
#
# For a CPU wheel of torch on Linux, point pip at one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make venv

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
LOWEST := .venv-lowest
ZERO := .venv-zero
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OFFLINE)
PYTEST := $(QUIET) $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := test
.PHONY: venv test test-all test-lowest test-zero nightly mutation mutation-sample audit lint format docs demo demo-quick

venv: $(STAMP)

# torch goes first and is then pinned to what came, so that no dependency can pull another build of it.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > .venv/constraints.txt
	$(BIN)/python -m pip install --constraint .venv/constraints.txt --editable ".[dev]"
	touch $(STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "(slow or not slow) and not gpu and not network and not nightly"
	$(MAKE) test-zero
	$(MAKE) test-lowest

# The fast tests with the lowest versions that pyproject.toml claims (and the caller's torch), in a venv of their own.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pip list | grep -E "^($$(sed 's/==.*//' $(LOWEST)/constraints.txt | paste -sd '|')) "
	$(QUIET) $(LOWEST)/bin/python -m pytest -n 2

$(LOWEST)/.installed: pyproject.toml tests/trust/floors.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install "$(TORCH)"
	$(LOWEST)/bin/python tests/trust/floors.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --constraint $(LOWEST)/constraints.txt --editable ".[dev]"
	touch $@

# DeepSpeed in a venv of its own, over the packages of .venv: where it is installed, every start of transformers pays.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
test-zero: $(ZERO)/.installed
	$(QUIET) $(ZERO)/bin/python -m pytest -n 0 -m slow -k zero tests/training/test_distributed.py

$(ZERO)/.installed: $(STAMP)
	test -x $(ZERO)/bin/python || $(BIN)/python -m venv $(ZERO)
	$(BIN)/python $(SITE) > $$($(ZERO)/bin/python $(SITE))/shared.pth
	DS_BUILD_OPS=0 $(ZERO)/bin/python -m pip install --quiet --no-deps deepspeed hjson py-cpuinfo msgpack ninja einops
	touch $@

# More than 20,000 generated cases, then 10,000 mutants of files, 10,000 flipped bytes and 100 kills, in memory where there
# is a /dev/shm, then mutants of the code; the seeds are in the tests, and -rP shows the figures.
MEMORY := $(shell test -w /dev/shm && echo TMPDIR=/dev/shm)
nightly: venv
	HYPOTHESIS_PROFILE=nightly $(MEMORY) $(PYTEST) tests/trust/test_properties.py tests/packing tests/quantizers
	$(MEMORY) $(PYTEST) -rP -m nightly tests/trust
	$(MAKE) mutation-sample

# Works on a copy, in mutants/; goes on where it was stopped. CORE="bitdistiller_peft.packing*" does a part of it, and
# `make mutation-sample` 300 of the 5,500 mutants, drawn with a seed. Then the score, and the survivors with their reasons.
CORE ?=
MUTMUT := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/mutmut
mutation: $(BIN)/mutmut
	$(MUTMUT) run $(CORE)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/trust/mutants.py retry
	$(BIN)/python tests/trust/mutants.py report

mutation-sample: $(BIN)/mutmut
	test -d mutants || $(MUTMUT) run bitdistiller_peft.packing.layout.x_row_words__mutmut_1
	$(MUTMUT) run $$($(BIN)/python tests/trust/mutants.py sample 300 7)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/trust/mutants.py retry
	$(BIN)/python tests/trust/mutants.py report

$(BIN)/mutmut: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt "mutmut>=3.8"

# Known vulnerabilities of what is installed in .venv; without a network it says so and passes.
audit: venv
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit || true
	.venv-audit/bin/python tests/trust/audit.py "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# The site, into site/: nothing is fetched when it is built or read.
docs: venv
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --editable ".[docs]"
	$(OFFLINE) $(BIN)/mkdocs build --strict

demo: venv
	$(BIN)/python examples/demo.py

demo-quick: venv
	$(BIN)/python examples/demo.py --quick
