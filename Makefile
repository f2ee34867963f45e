# The two commands: `make demo` and `make test`. Each makes its own environment in .venv on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers

LOCKER := .venv-lock

.PHONY: demo test coverage compose-test lock soak check bench bench-peers bench-ray bench-loggers docs schemas clean

demo: $(READY)
	$(BIN)/railbus demo

# A test may take 20 s where one is run by hand; beside others it is given longer. Four at once keep two cores busy, as
# many tests wait. What Python compiles is kept, even where the environment says not to: processes are started by the
# hundred. pytest takes half a minute to rewrite all asserts, which is done once, before four need it.
PYTEST := pytest -n 4 --dist worksteal --timeout 120 -m 'not docker'

test coverage: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	find tests -name 'test_*.py' | xargs -P 2 -n 140 $(BIN)/python -m pytest --collect-only -qq > /dev/null || true
	$(BIN)/python -m $(PYTEST)

# The same, traced, child processes as well: which lines and branches no test has come to. Takes twice as long.
coverage: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m $(PYTEST)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --skip-empty | tail -n 40

# The stack of compose.yaml for real. Makes a Docker engine where there is none, for which it must be root.
compose-test: $(READY)
	PYTHON=$(BIN)/python ci/docker/run

# What the images install, by hash; uv resolves it, in an environment of its own.
lock:
	test -x $(LOCKER)/bin/uv || ($(PYTHON) -m venv $(LOCKER) && $(LOCKER)/bin/python -m pip install --quiet uv==0.13.9)
	$(PYTHON) ci/lock $(LOCKER)/bin/uv

# What takes minutes and 45 GB of disk: 20 GB of data through a cache of 2 GB, 10,000 histories of a simulated cluster,
# thirty kills of telemetry with all else that can happen to it.
soak: $(READY)
	$(BIN)/python -m pytest -s tests/soak

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(READY)
	$(BIN)/python -m benchmarks

# Other loaders, to be measured against; some 3.5 GB that the project itself never needs.
bench-peers: $(READY)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet 'torch==2.13.0' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0

# Ray, whose `ray job submit` the benchmark `latency` is measured against; some 360 MB.
bench-ray: $(READY)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet 'torch==2.13.0' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/ray.txt

# The logger that the benchmark `telemetry` is measured against; small.
bench-loggers: $(READY)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/loggers.txt

docs: $(READY)
	$(BIN)/python -m railbus.reference docs

schemas: $(READY)
	$(BIN)/python -m railbus_shared.json_schemas docs/agi_json_schema

# constraints.txt pins what we test with; the CPU build of torch is several GB smaller than the default one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("railbus needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV); the first time, with torch to download, this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'torch==2.13.0' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
