# Everything runs in .venv, which the first target that needs it sets up. TORCH=2.13.0 asks for a version of torch there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OTHER := .venvs/$(TORCH)

.PHONY: demo test check lint types test-torch clean

demo: $(STAMP)  ## train a small Llama, plain and with PQT, side by side, and export it
	$(BIN)/python examples/train_gpt.py --model llama $(ARGS)

test: $(STAMP)  ## the default test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: lint types test  ## everything that CI runs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The source folders map to one package (gws_compile.passes lies in passes/), so the installed package is what is checked.
types: $(STAMP)
	rm -rf .venv/typecheck
	$(BIN)/python -m pip install -q --no-deps --target .venv/typecheck .
	cd .venv/typecheck && ../bin/python -m mypy --config-file ../../pyproject.toml -p gws_compile

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/python -m pip install -q torch==$(TORCH))
	$(BIN)/python -m pip install -q -e '.[dev,examples]'
	touch $@

# Its own environment, from whatever packages pip finds: set PIP_INDEX_URL for builds without CUDA. The results become a
# row of docs/torch-versions.md.
test-torch:  ## the tests on another torch: make test-torch TORCH=2.15.0 [ARGS=tests/passes]
	@test -n "$(TORCH)" || (echo "which torch? make test-torch TORCH=2.15.0" && false)
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install -q torch==$(TORCH) -e '.[dev,examples]'
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(OTHER)/inductor $(OTHER)/bin/python -m pytest -n 2 --dist loadfile \
	    --junitxml=$(OTHER)/results.xml $(ARGS) || true
	$(OTHER)/bin/python benchmarks/torch_versions.py $(OTHER)/results.xml $(ARGS)

clean:
	rm -rf .venv .venvs out build dist *.egg-info
