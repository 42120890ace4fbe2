# Two commands do everything on a fresh machine (Linux, Python 3.10 or newer):
#   make demo    denoise pictures with Inductor and with backend="chipmunk", side by side
#   make test    run the tests
# Both make their own environment in .venv first. TORCH chooses another torch build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-slow clean

demo: .venv/ready
	$(BIN)/python examples/quickstart.py

# One worker a core, compiling in its own process. PYTEST_ARGS adds to it: make test PYTEST_ARGS="-k permute".
test: .venv/ready
	TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

# Thousands of random graphs, full-size models: minutes.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# torch goes first and alone: any looser requirement may fetch another build of it.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[examples,test]"
	touch $@

clean:
	rm -rf .venv out
