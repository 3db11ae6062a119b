# make demo: wantrain run, the whole job, on the tiny base that ships with wantrain. make test: lint, types and tests. make slow and
# make long: the tests that the default tier leaves out.
# Each makes .venv and installs what it needs, once.
PYTHON ?= python3
RECIPE ?= demo_anime
RUN = .venv/bin/wantrain

# The tiny base is so small that a second thread and fresh pages cost more than they bring (docs/LOG.md).
export OMP_NUM_THREADS ?= 1
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 20000000000
export MALLOC_TOP_PAD_ ?= 300000000

.PHONY: demo test slow long clean
demo: .venv/installed
	$(RUN) run recipe=$(RECIPE)

test: .venv/installed-dev
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/pytest

slow: .venv/installed-dev
	.venv/bin/pytest -m "slow and not long" --dist loadfile --durations 40

long: .venv/installed-dev
	.venv/bin/pytest -m long --dist loadfile

# The versions are those that were tested. CPU-only machines take the CPU build of torch where one is offered (pip's
# find-links); others the default build.
.venv/installed: pyproject.toml launch/constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c launch/constraints.txt --quiet "torch==2.13.0"
	.venv/bin/pip install -c launch/constraints.txt --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/pip install -c launch/constraints.txt --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf runs cache .venv
