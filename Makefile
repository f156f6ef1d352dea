# SPDX-License-Identifier: Apache-2.0
# Quiet; `make V=1 ...` shows every command and its output. REQUIRE=spdk,qemu,gpu turns a missing
# need of the tests into a failure; T=tests/unit narrows `test` and `test-full`.

V ?= 0
Q := $(if $(filter 1,$(V)),,@)
T ?=
# threads that wait for each other asleep: a busy machine has no CPU to spare for spinning
PYTEST := OMP_WAIT_POLICY=passive .venv/bin/python -m pytest $(if $(filter 1,$(V)),-v,-q)
export V
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup setup-qemu run test test-full test-qemu soak bench lint asan tsan clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 \2/p' $(MAKEFILE_LIST) | \
	  while read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: ## .venv with the package and the C engine (every other target does it as needed)
	$(Q)scripts/setup_env.sh

setup-qemu: setup
	$(Q)scripts/setup_qemu.sh

run: setup ## a real run, offline; leaves build/run.json
	$(Q)scripts/demo.sh

test: setup setup-qemu ## the tests that this machine can run; one line a need at the end
	$(Q)$(PYTEST) -m "not slow and not soak" $(T)

test-full: setup setup-qemu ## the slow tests too
	$(Q)$(PYTEST) -m "not soak" $(T)

test-qemu: setup setup-qemu ## the tests in a virtual machine with NVMe drives and an IOMMU
	$(Q)REQUIRE=qemu $(PYTEST) -m "not soak" $(if $(T),$(T),tests/qemu)

soak: setup ## SOAK_ROUNDS (1000) with a controller that fails, SOAK_MINUTES (30) with a memory hog
	$(Q)REQUIRE=spdk $(PYTEST) -m soak tests/soak

bench: setup ## measure the engine on this machine
	$(Q).venv/bin/dualblade-spdk bench io

lint: setup ## ruff, mypy, and the C sources under strict warnings
	$(Q)scripts/lint.sh

asan: setup ## the C tests under AddressSanitizer and UBSan
	$(Q)scripts/sanitize.sh asan

tsan: setup ## the C tests under ThreadSanitizer
	$(Q)scripts/sanitize.sh tsan

clean: ## remove what was built, .venv included
	$(Q)rm -rf .venv build dist *.egg-info spdk_glue/_glue* .mypy_cache .pytest_cache .ruff_cache .hypothesis
