# Every target makes .venv first when it is missing, or when a list of requirements has changed. `make help` lists them.
PYTHON ?= python3
RUN = .venv/bin/python
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest

.PHONY: help demo check test test-slow compare
help:                    ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/' | awk -F: '{printf "make %-12s%s\n", $$1, $$2}'

.venv/installed: requirements.txt requirements-test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	@touch $@

demo: .venv/installed    ## train GRPO and DEEP-GRPO on the embedded task and draw the result, about eight minutes on two cores
	$(RUN) -m experiments.demo

check: .venv/installed   ## test every equation of the paper, half a minute
	$(PYTEST) -n 2 --dist loadfile tests/paper

test: .venv/installed    ## run all tests but the long ones, minutes
	$(PYTEST) -n 2 --dist loadfile tests/trainer/test_ranks.py tests/trainer/test_train.py tests/trainer/test_checkpoint.py tests

test-slow: .venv/installed  ## run the long tests, among them whole runs and runs that are killed
	$(PYTEST) -m slow tests

compare: .venv/installed ## compare all methods at an equal budget of tokens, about half an hour on two cores
	$(RUN) -m experiments.compare
