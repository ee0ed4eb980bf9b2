# make setup   .venv with the pinned dependencies and tsqlora itself, editable
# make demo    the main job on the embedded default
# make test    formatting, lint, types, tests: what CI runs
# make docs    the documentation as a site in site/; a warning is an error
# make chaos   runs killed at random moments and resumed: KILLS=25 SEED=0
# make fmt     format and repair what ruff can
# make clean   remove everything that can be made again, .venv included

PYTHON ?= python3
KILLS ?= 25
SEED ?= 0
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test docs chaos fmt clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tsqlora needs Python 3.10 or newer as '$(PYTHON)'; try: make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/tsqlora demo

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist loadfile

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

chaos: $(STAMP)
	$(BIN)/python tests/chaos.py --kills $(KILLS) --seed $(SEED)

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
