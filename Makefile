# Two commands: `make demo` shows the project at work, `make test` checks it. Both set up .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TEST_WORKERS ?= 2

.PHONY: help demo test lint types clean

help:
	@echo "make demo    train the example's projection on a CPU and ask it a question"
	@echo "make test    lint, types and tests"
	@echo "make clean   remove .venv and caches"

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --cfg-path examples/demo/train.yaml --options run.output_dir=output/demo
	$(BIN)/python test_model_chat.py --cfg-path examples/demo/train.yaml --device cpu \
	    --image examples/demo/image/red_square.png --max-new-tokens 24 \
	    --checkpoint $$(ls -td output/demo/*/ | head -n 1)checkpoint_latest.pth
	@echo "the loss curve: $$(ls -td output/demo/*/ | head -n 1)loss.png"

test: lint types
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
