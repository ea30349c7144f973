# make demo: watch GRPO and DEEP-GRPO learn.   make compare: all methods at equal budget, 35 minutes.   make test: check every formula.   make test-slow: a whole run of two processes.
# All make .venv first when it is missing.
PYTHON ?= python3

.PHONY: demo compare test test-slow
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed
	.venv/bin/python -m experiments.demo

compare: .venv/installed
	.venv/bin/python -m experiments.compare

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile tests/trainer/test_train.py tests/trainer/test_ranks.py tests/trainer/test_checkpoint.py tests

test-slow: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow tests
