# Palisade: build, install, test and show. `make help` lists the targets.

DESTDIR ?=
PREFIX ?= /usr
CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target

BINARIES := palisade palisaded palisade-agents
RELEASE := $(CARGO_TARGET_DIR)/release
ROOT := $(DESTDIR)$(PREFIX)
REFERENCE_NAMES := drbdadm drbdsetup drbdmeta
OCF_AGENTS := drbd

.PHONY: help build install uninstall setup demo demo-down test bench soak fmt lint clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

build:  ## build every program (release)
	$(CARGO) build --release --locked $(addprefix -p ,$(BINARIES))

install: build  ## install below $(DESTDIR)$(PREFIX)
	install -D -m 755 -t $(ROOT)/sbin $(RELEASE)/palisade $(RELEASE)/palisaded
	install -D -m 755 -t $(ROOT)/lib/palisade $(RELEASE)/palisade-agents
	install -d $(ROOT)/lib/palisade/compat $(ROOT)/lib/ocf/resource.d/palisade $(ROOT)/lib/systemd/system
	for name in $(REFERENCE_NAMES); do \
		ln -sfn ../../../sbin/palisade $(ROOT)/lib/palisade/compat/$$name || exit 1; done
	for name in $(OCF_AGENTS); do \
		ln -sfn ../../../palisade/palisade-agents $(ROOT)/lib/ocf/resource.d/palisade/$$name || exit 1; done
	sed 's|@SBINDIR@|$(PREFIX)/sbin|' packaging/systemd/palisaded@.service \
		> $(ROOT)/lib/systemd/system/palisaded@.service

uninstall:  ## remove what install put there
	rm -f $(ROOT)/sbin/palisade $(ROOT)/sbin/palisaded $(ROOT)/lib/systemd/system/palisaded@.service
	rm -rf $(ROOT)/lib/palisade $(ROOT)/lib/ocf/resource.d/palisade

setup:  ## install what building, testing and the demonstration need (Debian 12)
	packaging/setup

demo: setup  ## a replicated volume survives its primary under Pacemaker (as root)
	demo/demo run $(DEMO_ARGS)

demo-down:  ## remove everything the demonstration made
	demo/demo down

test: setup  ## every test; as root, about half an hour
	ocf-tests/test-all $(TEST_ARGS)

bench: setup  ## throughput and latency beside the raw disk and a peer system (as root)
	bench/bench $(BENCH_ARGS)

soak: setup  ## simulation seeds and fail-over demonstrations until SOAK_MINUTES (60) are over
	ocf-tests/soak

fmt:  ## format the sources
	$(CARGO) fmt --all

lint:  ## formatting, clippy, scripts, licences and advisories
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	shellcheck $$(git ls-files | xargs grep -lE '^#!/bin/(ba)?sh' --)
	@if ! command -v cargo-deny >/dev/null; then \
		echo 'lint: cargo-deny is not installed, deny.toml was not checked' \
			'(cargo install --locked cargo-deny)'; \
	else $(CARGO) deny check bans licenses sources && \
		if $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny check advisories; \
		else echo 'lint: the advisory database cannot be fetched, advisories were not checked'; fi; \
	fi

clean:  ## remove what was built
	$(CARGO) clean
