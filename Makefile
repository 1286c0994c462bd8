# make demo: adapt a small SegFormer to another camera, in minutes.   make test: what CI runs.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Threads that wait by spinning make a step many times slower where others use the same cores.
export OMP_WAIT_POLICY ?= PASSIVE
# torch asks Linux for large pages: a new map of 134 MB in 31 instead of 50 ms, the head on 1024x2048 in less than half.
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: demo test browser install benchmark faults cards

demo: install
	$(VENV)/bin/t2sda train --config demo $(ARGS)

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Pages and the demo in a real browser: needs chromium. Where its packages are installed, `make test` runs these, too.
browser: $(VENV)/.browser
	@command -v chromium > /dev/null || { echo "make browser needs chromium (Debian: apt-get install chromium)"; exit 2; }
	$(VENV)/bin/python -m pytest tests/hub/test_demo_in_browser.py

benchmark: install
	$(VENV)/bin/python scripts/benchmark.py $(ARGS)

faults: install
	$(VENV)/bin/python tests/faults/campaign.py $(ARGS)

cards: install
	PYTHONPATH=. $(VENV)/bin/python tests/hub/reproduce_cards.py $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.browser: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	touch $@
