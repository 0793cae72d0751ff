PYTHON ?= python3
# One environment; what the tests compare with lies beside it: two releases of transformers or triton can't share one, and
# timm needs torchvision, of which PyPI has no build that fits a CPU build of torch (its Python part does for the tests).
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
REFERENCES := .venv/references
OLD_TRANSFORMERS := $(REFERENCES)/transformers-4.57.6

.PHONY: demo test test-thorough test-processors lint types docs bench gpu pages clean

# The main job: make a checkpoint, convert it, features and picture of a photograph. Of trained weights, where there is a
# network: make demo MODEL=robbyant/lingbot-vision-vit-small (or any other hub id, folder or file).
MODEL ?= demo/checkpoint
demo: .venv/installed-demo
	rm -rf demo && mkdir demo
ifeq ($(MODEL),demo/checkpoint)
	$(BIN)/python -m dinov3_lite sample $(MODEL)
endif
	$(BIN)/python -m convert $(MODEL) --output demo/dinov3_lite.safetensors
	cp "$$($(BIN)/python -c 'from matplotlib.cbook import get_sample_data; print(get_sample_data("grace_hopper.jpg", asfileobj=False))')" demo/photo.jpg
	$(BIN)/python -m dinov3_lite features demo/photo.jpg --model demo/dinov3_lite.safetensors --size 768 \
		--output demo/features.safetensors --picture demo/pca.png --query 290,270

# All tests, then the parity tests once more against an older transformers. A process a core, each with one thread: two
# of torch's thread pools on the same cores wait for each other.
test: export OMP_NUM_THREADS = 1
test: .venv/installed-dev
	$(BIN)/pytest -n auto --dist loadfile
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/pytest -n auto -k 'not vith16plus and not vit7b16' \
		tests/test_parity.py tests/test_convnext_parity.py tests/test_checkpoint_layouts.py

# What `make test` leaves out for its time: four processes on fewer than four cores.
test-thorough: export THOROUGH = 1
test-thorough: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_sharding.py tests/test_distributed.py

# The tests whose numbers depend on the processor's instructions, as on one without AMX, on one without AVX-512 either,
# and with a torch that lacks oneDNN: each with a cache of inductor's own, since what was compiled for other instructions
# gives NaN. Whatever else `make test` runs can be run so, too. docs/tried.md says what was run where.
PROCESSOR_TESTS := $(wildcard tests/test_*parity*.py tests/test_inference*.py tests/test_prepared*.py) \
	tests/test_graphs.py tests/test_modules.py tests/test_convnext_uses.py
ON_PROCESSOR = TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) $(BIN)/pytest -n auto --dist loadfile $(PROCESSOR_TESTS)
test-processors: export OMP_NUM_THREADS = 1
test-processors: .venv/installed-dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE $(ON_PROCESSOR)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(ON_PROCESSOR)
	PYTHONPATH=tests/support $(ON_PROCESSOR) -p without_onednn

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed-dev
	$(BIN)/mypy

# The pages as a site, site/index.html. Strict: a link that leads nowhere fails.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/installed-docs
	$(BIN)/mkdocs build -q

# Ours beside transformers, timm, onnxruntime and OpenVINO: times, then the peaks of memory.
bench: .venv/installed-dev
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/compare.py --again
	$(BIN)/python benchmarks/compare.py --memory

# The tables and charts of all pages, from the committed results.
pages: .venv/installed-dev .venv/installed-demo
	$(BIN)/python benchmarks/page.py

# What waits for a GPU: tests, tuning, timings, the most valuable first. Needs torch and triton, no installation.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu.py

clean:
	rm -rf .venv demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed-demo: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) install -q -c constraints.txt -e '.[images,plots]'
	touch $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) install -q -c constraints.txt -e '.[images,plots,export,dev]'
	$(PIP) install -q --no-deps --upgrade --target $(OLD_TRANSFORMERS) transformers==4.57.6 huggingface-hub==0.36.2 \
		tokenizers==0.22.2 requests urllib3 idna certifi charset-normalizer
	$(PIP) install -q --no-deps --upgrade --target $(REFERENCES)/torchvision -c constraints.txt torchvision timm
	$(PIP) install -q --no-deps --upgrade --target $(REFERENCES)/triton-3.6.0 triton==3.6.0 'numpy<2.4'
	touch $@
