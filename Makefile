# `make demo` trains, publishes and reloads a small BiFormer; `make test` runs every check. Both install into .venv first.
# `make test-mm` is the part of `make test` that needs OpenMMLab's packages: in environments in ~/.cache/striate, which the
# first time take minutes to make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
THREADS ?= $(shell nproc)

.PHONY: demo test lint typecheck unit test-mm clean

demo: .venv/.installed
	$(BIN)/striate demo

test: lint typecheck unit test-mm

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows files, not import hooks: it gets the package as one folder of links
typecheck: .venv/.installed-test
	rm -rf build/typecheck
	mkdir -p build/typecheck/striate
	for entry in striate/__init__.py striate/py.typed ops backbones hub detection segmentation train configs; do \
		ln -s "$(CURDIR)/$$entry" build/typecheck/striate/; done
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p striate

# one process per core with one thread each: the tests are many and small
unit: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal

test-mm:
	python=$$(PYTHON=$(PYTHON) tests/mm/install.sh) && OMP_NUM_THREADS=1 $$python -m pytest -n $(THREADS) --dist worksteal tests/mm
	python=$$(PYTHON=$(PYTHON) tests/mm/install.sh originals) && OMP_NUM_THREADS=1 $$python -m pytest tests/mm/originals

.venv/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv build demo
