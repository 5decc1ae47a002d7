# SPDX-License-Identifier: Apache-2.0
# PYTHON=...  builds .venv on that interpreter (3.11 or newer).
# OFFLINE=1   fetches nothing: .venv borrows torch and the rest from PYTHON. For a GPU machine without a registry.
# DEVICE=cpu  of gpu-check: emulates the GPU.
# COMMIT=...  of gpu-check: what is checked, where the folder is no git checkout.
export PYTHON OFFLINE
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-clients fuzz lint gpu-check report docs clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):  *## */\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo:  ## install what is missing, then train on real recordings and time against torch.nn
	@.ci/venv demo
	@$(PY) -m gpu_rnn demo $(ARGS)

test:  ## the tests, at most 15 minutes on 2 cores
	@.ci/venv demo test keras docs
	@$(PY) tests -m "not slow" $(ARGS)

test-all:  ## the slow tests too, and test-clients (CONTRIBUTING.md: how long); broken off, it goes on where it was
	@.ci/venv demo test keras docs
	@status=0; export RESUME=1; \
	$(PY) tests --ignore=tests/clients $(ARGS) || status=$$?; \
	$(MAKE) --no-print-directory test-clients || status=$$?; \
	exit $$status

CLIENTS := tests/clients tests/test_interop_flax.py tests/layers/test_types.py $(addprefix tests/project/test_,distributed.py examples.py site.py)
test-clients:  ## the slow tests with other libraries, installed into build/clients; test-all runs them too
	@.ci/venv demo test keras docs
	@.ci/clients clients pretrained streaming distributed flax site types
	@build/clients/bin/python tests $(CLIENTS) -m slow -n0 $(ARGS)

SECONDS ?= 60
fuzz:  ## random calls of every backend beside loops by hand, for SECONDS=60
	@.ci/venv demo test keras docs
	@$(PY) tests/fuzzing --seconds $(SECONDS) $(ARGS)

lint:  ## ruff, mypy, clang-format
	@.ci/venv demo test keras docs dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	find kernels tests benchmarks \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.c' -o -name '*.h' \) -print0 \
		| xargs -0 -r .venv/bin/clang-format --dry-run -Werror

gpu-check:  ## on a machine with a GPU: a certificate and a quick benchmark, under 10 minutes
	@.ci/venv demo test keras docs
	@$(PY) -c 'import sys, torch; sys.exit(None if "$(DEVICE)" == "cpu" or torch.cuda.is_available() else \
		"gpu-check: torch sees no GPU here; the same with an emulated one: make gpu-check DEVICE=cpu")'
	@status=0; \
	$(PY) benchmarks/certify.py $(if $(DEVICE),--device $(DEVICE)) $(if $(COMMIT),--commit $(COMMIT)) || status=$$?; \
	[ $$status -lt 128 ] || exit $$status; \
	timeout 85 $(PY) benchmarks/run.py $(if $(filter cpu,$(DEVICE)),--emulate --set tiny --seconds 30,--quick --seconds 70) \
		$(if $(COMMIT),--commit $(COMMIT)) || status=$$?; \
	exit $$status

report:  ## tables and pictures from benchmarks/results
	@.ci/venv demo
	$(PY) benchmarks/report.py $(ARGS)

docs:  ## the documentation site, into build/docs
	@.ci/venv docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo 'open build/docs/index.html, or with a search field: python3 -m http.server -d build/docs'

clean:  ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
