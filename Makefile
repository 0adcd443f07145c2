# One front door. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Tools of a toolchain and of sbin may be missing from a non-interactive shell's PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
CACHE := $(or $(KATA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kata-shimv2)
DESTDIR ?= /
VENV := build/venv
PYTHON := $(VENV)/bin/python
AGENT := build/agent-target/x86_64-unknown-linux-gnu/release/kata-agent
CHECKED := ttrpc agent_proto hypervisors netns shimv2 guest

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "make run IMAGE=docker.io/library/alpine:latest CMD='uname -a' runs something of yours."

.PHONY: setup
setup: venv ## Packages, Python environment, Rust, vsock device: all that `make run` needs
	@packaging/setup/packages.sh
	@packaging/setup/vsock_device.sh

.PHONY: venv
venv:
	@packaging/setup/packages.sh build
	@packaging/setup/venv.sh

.PHONY: tools
tools: ## What the tests run beside the packages: containerd 2.x, crictl, critest, nerdctl
	@packaging/setup/containerd2.sh
	@packaging/setup/cri_tools.sh
	@packaging/setup/nerdctl.sh

.PHONY: agent
agent: venv
	@packaging/setup/rust.sh
	@. build/setup/rust.env; cd guest/agent; \
	echo "agent: cargo build (a minute the first time)"; \
	cargo build --quiet --release --locked --target-dir ../../build/agent-target

.PHONY: guest
guest: agent ## Guest kernel and initrd, into build/guest
	@$(PYTHON) -m guest.image.build --agent $(AGENT) --output build/guest --cache $(CACHE)

.PHONY: shim
shim: venv ## The shim that runs from this checkout, into build/bin
	@$(PYTHON) packaging/install.py tree

.PHONY: protos
protos: venv ## Generate the message classes again from the .proto files
	$(PYTHON) packaging/generate_protos.py

.PHONY: run
run: setup guest shim ## Run a container in a virtual machine of its own, and show it
	@$(PYTHON) packaging/demo/run.py $(if $(VMM),--vmm '$(VMM)') $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),-- $(CMD))

.PHONY: lint
lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --cache-dir=build/mypy_cache $(CHECKED) packaging/*.py packaging/demo/*.py

.PHONY: lint-agent
lint-agent: venv
	@packaging/setup/rust.sh
	@. build/setup/rust.env; cd guest/agent; export CARGO_TARGET_DIR=../../build/agent-target; \
	if cargo fmt --version >/dev/null 2>&1; then cargo fmt --check; \
	else echo "cargo fmt is not installed: formatting not checked"; fi; \
	if cargo clippy --version >/dev/null 2>&1; then \
	cargo clippy --quiet --locked --all-targets -- -D warnings; \
	else echo "cargo clippy is not installed: clippy not run"; fi; \
	cargo test --quiet --locked

.PHONY: check
check: lint shim ## Lint, types and the tests that need no root: quick
	$(PYTHON) -m pytest -m "not root and not e2e and not kvm"
	@$(MAKE) --no-print-directory lint-agent

.PHONY: test
test: setup tools guest shim lint-agent ## Everything, virtual machines under real containerds included
	@$(PYTHON) -m tests.second_run $(TESTS)

.PHONY: test-kvm
test-kvm: setup tools guest shim ## The end-to-end tests on an emulated node with KVM, with each VMM found
	@$(PYTHON) -m tests.kvm_node.suite $(addprefix --vmm ,$(VMM)) $(if $(TESTS),-- $(TESTS))

.PHONY: kvm-node
kvm-node: ## Run CMD on an emulated node with KVM; of what it writes only WRITABLE stays
	@test -e build/guest/manifest.json || $(MAKE) --no-print-directory setup guest shim
	@$(PYTHON) -m tests.kvm_node $(addprefix --writable ,$(WRITABLE)) -- bash -c '$(CMD)'

.PHONY: test-cri
test-cri: setup tools guest shim ## All of Kubernetes' critest, against this shim and runc's
	$(PYTHON) -m tests.cri $(SPECS)

.PHONY: bench
bench: setup guest shim ## Measure, and compare with runc's shim in the same run
	$(PYTHON) -m tests.bench

.PHONY: install
install: setup guest ## Install for this machine, or below DESTDIR
	@$(PYTHON) packaging/install.py install --destdir $(DESTDIR)

.PHONY: clean
clean: ## Remove build/; downloaded and compiled tools stay in the tool cache
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
