# make demo    erase a concept from the embedded model; results in out/demo
# make test    the test suite
# make test-all  the same with what is slow: sanitizers, blocks of all pages, other GPUs' machine code
# make lint    style and types
# make wheel   a wheel for other machines, checked; in out/wheel
# make setup   only the environment that these use: .venv, or the active one if it has torch
# make clean   remove what was built here (not .venv)

PYTHON ?= python3
OUT ?= out/demo

# OpenMP's threads spin while they wait, which hurts where cores are shared: let them sleep.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all lint wheel setup clean
.DEFAULT_GOAL := help

# Runs $(1) with $$python set to the Python of the environment.
with_environment = python=$$($(PYTHON) tools/setup_env.py $(SETUP)) && $(1)

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile

setup:
	@$(call with_environment,echo "ready: $$python")

# The cores that are there. On two with AVX2, two threads took 33 s and 50 s of CPU time, one thread
# 45 s and 45 s. At most four: a batch of the demo's small images does not keep more busy.
demo: export OMP_NUM_THREADS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
# A compiler that is missing, or does not work, costs speed and not the demo.
demo: SETUP = --go-on
demo:
	@$(call with_environment,"$$python" -m realera_fast demo --out "$(OUT)")

# Side by side: Triton's interpreter, which the kernels' tests need where there is no GPU, is a choice
# for the whole process, and the tests in tests/aot compile instead. What these say is shown at the
# end. The others are shared by two processes, file by file: one thread each. The longest files come
# first (tests/conftest.py), so that both end together. The slowest twenty show a regression.
test: CHOSEN = not slow
test-all: CHOSEN = slow or not slow
test test-all: export OMP_NUM_THREADS ?= 1
test test-all:
	@mkdir -p out
	@$(call with_environment,{ \
	  env -u TRITON_INTERPRET "$$python" -m pytest -q -m "$(CHOSEN)" --durations=5 tests/aot > out/aot.log 2>&1 & aot=$$!; \
	  "$$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	    --benchmark-disable -m "$(CHOSEN)" --durations=20 tests; \
	  status=$$?; \
	  wait $$aot || status=$$?; cat out/aot.log; exit $$status; })

lint:
	@$(call with_environment,"$$python" -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy)

wheel:
	@$(call with_environment,"$$python" tools/make_wheel.py)

clean:
	rm -rf build out *.egg-info realera_fast/_C.abi3.so .pytest_cache .ruff_cache .mypy_cache
