# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint types clean

demo: $(STAMP)  ## train a small GPT-2, plain and with PQT, side by side
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: $(STAMP)  ## the default test suite
	$(BIN)/python -m pytest -n 2 $(ARGS)

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
	$(BIN)/python -m pip install -q -e '.[dev,examples]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
