# Everything installs itself: `make demo` and `make test` are the two commands a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Programs that tests compare podwire with; podwire itself needs none of them.
TEST_PACKAGES := nftables iptables iproute2 iperf3 etcd-server etcd-client containernetworking-plugins gcc libc6-dev podman crun conmon busybox-static containerd runc

NOT_FETCHED   := { echo "the libraries in pyproject.toml could not be fetched: pip needs a package index (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)"; exit 1; }
MISSING        = $(shell for p in $(TEST_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done)
# Where all of them are, a test may only be skipped for a reason that is listed.
PYTEST_STRICT  = $(if $(MISSING),,--allowed-skips tests/allowed-skips.txt)

# BASE: a Debian with Python 3.11 or newer. IMAGE_FLAGS: for the builder, such as --volume or --isolation chroot.
IMAGE       ?= podwire
BASE        ?= python:3.13-slim
BUILDER     ?= $(or $(firstword $(foreach b,podman buildah docker,$(shell command -v $(b)))),podman)
IMAGE_FLAGS ?=

.PHONY: demo test test-code test-packets test-vm test-real lint bench format clean test-packages image check-image

demo: $(VENV)/.installed
	@$(BIN)/podwire demo
	@echo; echo "A lab of your own: $(BIN)/podwire lab up --nodes 3 -f examples/shop --wait"

# Two halves at once: the one mostly computes, the other mostly waits for packets and time-outs.
test: $(VENV)/.installed-dev test-packages
	@echo "two halves at once; each prints when it is done, after some five minutes"
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-code test-packets

test-code: $(VENV)/.installed-dev
	$(BIN)/pytest tests/unit tests/contract $(PYTEST_STRICT)

test-packets: $(VENV)/.installed-dev
	$(BIN)/pytest tests/kernel tests/lab $(PYTEST_STRICT)

# On a kernel in a virtual machine that has IPVS, WireGuard, IPIP and netem; see tests/support/vmrun.py.
test-vm: $(VENV)/.installed-dev
	$(BIN)/pytest tests/vm --timeout 600

# Against Kubernetes' own programs, where PODWIRE_KUBE_APISERVER and others name them; docs/guides/kubernetes.md.
test-real: $(VENV)/.installed-dev
	$(BIN)/pytest tests/real

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy src tests bench
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench

bench: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m bench

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "podwire needs Python 3.11 or newer; $(PYTHON) is older. Say which to use: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; \
	  else echo "Python's venv module is missing. As root: apt-get install python3-venv"; exit 1; fi; $(PYTHON) -m venv $(VENV); }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "setting up $(VENV) …"
	@$(BIN)/pip install -q --disable-pip-version-check -e . || $(NOT_FETCHED)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "setting up $(VENV) for development …"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' || $(NOT_FETCHED)
	@touch $@ $(VENV)/.installed

test-packages:
	@missing="$(MISSING)"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	elif [ -n "$$missing" ]; then \
	  echo "tests that compare with these Debian packages will be skipped: $$missing (as root: apt-get install $$missing)"; fi

image:
	$(BUILDER) build $(IMAGE_FLAGS) --build-arg BASE=$(BASE) -t $(IMAGE) -f deploy/Containerfile .

# Builds it on a base made of Debian's packages, and does from it what a node's first containers do. Root, five minutes.
check-image:
	deploy/check-image.sh

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/results
