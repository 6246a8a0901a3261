# Everything a newcomer or CI needs. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.

# Half of the tests start Python, again and again: it may keep what it has compiled.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
TORCH_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTO := mii_serve/proto/v1/image_generation.proto

.PHONY: clients chromium peers demo test test-fast deployment-test image-test release check stubs goldens grade gpu-test gpu-bench gpu-tune clean

# torch goes first and pinned, so that nothing else decides which build is taken. The registry's own build brings several gigabytes
# of CUDA packages; on a machine without a GPU, TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu' avoids them.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH_FLAGS) torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

# Other people's clients, each in an environment of its own: what they pin must not meet what we pin.
CLIENTS := $(patsubst tests/clients/%.txt,.clients/%/.installed,$(wildcard tests/clients/*.txt))

.clients/%/.installed: tests/clients/%.txt
	test -x .clients/$*/bin/python || $(PYTHON) -m venv .clients/$*
	.clients/$*/bin/pip install -q -r $<
	touch $@

# mii imports torch and its kin. This environment looks into ours for what it has not itself, so that torch is here once; deepspeed's
# build wants to import it, too, and with DS_BUILD_OPS=0 compiles nothing.
.clients/mii/.installed: tests/clients/mii.txt $(INSTALLED)
	test -x .clients/mii/bin/python || $(BIN)/python -m venv .clients/mii
	.clients/mii/bin/pip install -q wheel==0.45.1
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.clients/mii/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	DS_BUILD_OPS=0 .clients/mii/bin/pip install -q --no-deps --no-build-isolation -r $<
	touch $@

# A model that was exported for MLflow computes with torch: this environment borrows ours, too, and installs what is not there.
.clients/mlflow/.installed: tests/clients/mlflow.txt $(INSTALLED)
	test -x .clients/mlflow/bin/python || $(BIN)/python -m venv .clients/mlflow
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.clients/mlflow/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	.clients/mlflow/bin/pip install -q -r $<
	touch $@

clients: $(CLIENTS)

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

# The tests of the page drive a real one; where none can be had they are skipped.
chromium: $(INSTALLED)
	tools/install_chromium.sh $(BIN)/python

# Half of the suite starts servers and waits for them, so that two processes share two cores well. A file stays in one process.
TEST_PROCESSES ?= 2

test: $(INSTALLED) $(CLIENTS) chromium
	$(BIN)/python -m pytest -m "not gpu and not deployment" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_PROCESSES) --dist loadfile tests/unit tests/contract tests/integration

# Checks deployment/ with the tools of those who use it: helm, promtool, hadolint and others, installed into a folder of their own.
.deployment-tools/.installed: tools/install_deployment_tools.sh
	tools/install_deployment_tools.sh .deployment-tools $(PYTHON)

deployment-test: $(INSTALLED) .deployment-tools/.installed .clients/azureml/.installed .clients/mlflow/.installed
	$(BIN)/python -m pytest -m "not gpu" tests/deployment --ignore tests/deployment/test_image.py

# Builds the CPU image without a registry, and serves from it: ten minutes and more on two cores. Needs root.
image-test: $(INSTALLED) .deployment-tools/.installed
	tools/install_deployment_tools.sh .deployment-tools $(PYTHON) image
	$(BIN)/python -m pytest tests/deployment/test_image.py

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Wheel, source distribution, SBOM, licences and checksums in dist/, tried in an empty environment. RELEASE_FLAGS=--draft for a trial.
release: $(INSTALLED)
	$(BIN)/python tools/release.py $(RELEASE_FLAGS)

stubs: $(INSTALLED)
	PATH=$(BIN):$$PATH $(BIN)/python tools/generate_stubs.py

# Rewrites what the contract tests compare with. Read the diff line by line.
goldens: stubs
	$(BIN)/python -m pytest tests/contract tests/docs/test_parameters_page.py --update-goldens

grade: $(INSTALLED)
	$(BIN)/python tools/publish_demo_grades.py

# Each takes nine minutes at most, keeps what it has found after each row, and goes on from there when it is run again.
gpu-test: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_tests.py

gpu-bench: $(INSTALLED)
	$(BIN)/python benchmarks/engines.py --repeats 3
	$(BIN)/python tools/publish_figures.py

gpu-tune: $(INSTALLED)
	$(BIN)/python benchmarks/kernel_times.py
	$(BIN)/python tools/publish_figures.py

# Other people's servers beside ours, under the same load on this machine; no part of `make test`.
.peers/.installed: benchmarks/peers/requirements.txt
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	DS_BUILD_OPS=0 .peers/bin/pip install -q $(TORCH_FLAGS) torch==2.13.0
	DS_BUILD_OPS=0 .peers/bin/pip install -q -r $<
	.peers/bin/pip install -q --no-deps deepspeed-mii==0.3.3
	touch $@

peers: $(INSTALLED) .peers/.installed
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf $(VENV) .clients .peers .release .deployment-tools build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
