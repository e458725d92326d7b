# ibex: `make help` lists what there is. Everything lives in .venv; nothing is installed outside this directory.

.DEFAULT_GOAL := help

# The first Python that runs and is new enough; 3.11 is what ibex is built and tested on.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
TESTS ?= tests
TEST_PROCESSES ?= 2
BENCH ?= overhead
COMPOSE ?= docker compose
COMPOSE_DEV = $(COMPOSE) -f infra/compose/compose.dev.yaml

##@ Use it
.PHONY: setup run e2e-smoke
setup: $(INSTALLED) ## Make .venv and install the locked dependencies (only when they changed)
	@:

run: $(INSTALLED) ## Set up, then serve on 127.0.0.1:8080 with embedded stores; Ctrl-C stops all of it
	@exec $(BIN)/ibexctl serve

e2e-smoke: $(INSTALLED) ## Ask a running ibex for a completion and check what it recorded (needs OPENAI_API_KEY)
	@PATH="$(abspath $(BIN)):$$PATH" infra/scripts/e2e_smoke_p2.sh

##@ Check it
.PHONY: test test-chaos test-clients loadtest lint format types imports check
test: $(INSTALLED) ## Run the whole test suite on real embedded engines (TESTS=tests/stores for a part)
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

test-chaos: $(INSTALLED) ## Kill, hang and restart a house under load, CHAOS_ROUNDS=100 times, and count what is left
	@CHAOS_ROUNDS="$${CHAOS_ROUNDS:-100}" CHAOS_RELOADS="$${CHAOS_RELOADS:-20}" \
		CHAOS_OUTAGE_SECONDS="$${CHAOS_OUTAGE_SECONDS:-60}" CHAOS_HOSTILE="$${CHAOS_HOSTILE:-10000}" \
		$(BIN)/python -m pytest -o log_cli=true --log-cli-level=INFO tests/chaos tests/network

test-security: $(INSTALLED) ## The security matrix, tenancy, two nodes, strangers and the HTTP edge alone
	@$(BIN)/python -m pytest tests/security

test-clients: $(INSTALLED) $(CLIENTS)/.installed ## Drive ibex with other people's clients, from an environment of their own
	@IBEX_TEST_PYTHON="$(abspath $(BIN)/python)" $(CLIENTS)/bin/python -m pytest \
		--confcutdir=tests/clients -W ignore tests/clients # their warnings are theirs

loadtest: $(INSTALLED) ## The gate: what ibex adds for 100 users at once, by locust (BENCH=saturation for another scenario)
	@$(INSTALL_LOCUST)
	@$(BIN)/ibexctl bench $(BENCH)

lint: $(INSTALLED) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED) ## ruff: write the formatting and the fixes that are safe
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

types: $(INSTALLED) ## mypy --strict on ibex and ibexctl
	@$(BIN)/mypy ibex ibexctl

imports: $(INSTALLED) ## import-linter: the layers, who may import a driver, no cycles
	@$(BIN)/lint-imports

check: lint types imports test ## All of the above

##@ Release it
.PHONY: exit-gate release-check
exit-gate: $(INSTALLED) ## Prove every line of the exit checklist and write docs/exit-gate.md (JAEGER_URL=… for a Jaeger)
	@$(INSTALL_LOCUST)
	@$(BIN)/python -m infra.gate $(if $(JAEGER_URL),--jaeger "$(JAEGER_URL)")

release-check: $(INSTALLED) ## Gate, versions, CHANGELOG, wheel and sdist: then print the commands that a person runs
	@$(BIN)/python -m infra.gate.release

##@ Run it in containers, with Postgres, Redis, ClickHouse, Jaeger, Prometheus and Grafana
.PHONY: compose-dev-up compose-dev-down compose-dev-logs compose-dev-ps
compose-dev-up: ## Build the image, start everything, wait until it serves, and print a line to paste (needs Docker)
	@$(COMPOSE_DEV) up --build --detach --wait
	@printf '\nTry it:\n\n'
	@$(COMPOSE_DEV) exec -T ibex python -c 'from ibexctl.serve import try_line; print(try_line("http://127.0.0.1:8080"))'
	@printf '\n'; printf '  %-12s%s\n' Grafana http://127.0.0.1:3000 Prometheus http://127.0.0.1:9090 Jaeger http://127.0.0.1:16686
	@printf '\n  $(COMPOSE_DEV) exec ibex ibexctl trace list\n'

compose-dev-down: ## Stop it all; data stays (make compose-dev-down DOWN=--volumes removes it)
	@$(COMPOSE_DEV) down $(DOWN)

compose-dev-logs: ## Follow what it logs (SERVICE=ibex for one of them)
	@$(COMPOSE_DEV) logs --follow $(SERVICE)

compose-dev-ps: ## Show what runs, and how healthy it is
	@$(COMPOSE_DEV) ps --all

##@ Look after it
.PHONY: docs schemas lock clean clean-data
schemas: $(INSTALLED) ## Write the texts of the schemas in tests/stores/schemas/ from the migrations
	@IBEX_TEST_RENEW_SCHEMAS=1 $(BIN)/python -m pytest -q tests/stores/test_schema_texts.py

docs: $(INSTALLED) ## Write .env.example, the tables of docs/ and the dashboards from the code
	@$(BIN)/python infra/scripts/write_reference.py
	@$(BIN)/python infra/grafana/write_dashboards.py

lock: $(INSTALLED) ## Resolve pyproject.toml and the clients of the tests again into the lock files
	@$(BIN)/uv pip compile $(LOCK_OPTIONS) --annotate --extra embedded --group dev -o requirements.lock pyproject.toml
	@grep -om1 '^uv==[0-9.]*' requirements-uv.lock | \
		$(BIN)/uv pip compile $(LOCK_OPTIONS) --no-annotate -o requirements-uv.lock -
	@$(BIN)/uv pip compile $(LOCK_OPTIONS) --annotate -o requirements-clients.lock tests/clients/requirements.in
	@! grep -n '://' requirements*.lock || { echo 'make: a lock file names an address' >&2; exit 1; }

clean: ## Remove both environments and every cache; data stays
	rm -rf $(VENV) $(CLIENTS) dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-data: ## Remove the development data directory .ibex (stop ibex first)
	@if [ -x $(BIN)/ibexctl ] && IBEX_DATA_DIR=.ibex $(BIN)/ibexctl status >/dev/null 2>&1; then \
		echo 'make: ibex is running on .ibex; stop it first' >&2; exit 1; fi
	@home=$$(cat .ibex/postgres-home 2>/dev/null); \
	 case "$$home" in /var/lib/ibex/?*) rm -rf -- "$$home" ;; esac # where PostgreSQL's data lies for root
	rm -rf .ibex

.PHONY: help
help:
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# locust is wanted by the benchmark's gate alone, so it is in no lock.
INSTALL_LOCUST = $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("locust") is None)' || { $(INDEX); \
	$(BIN)/uv pip install --python $(BIN)/python -c requirements.lock 'locust>=2.47'; }

INDEX := export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$${PIP_INDEX_URL-}}"; \
	[ -n "$$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX

LOCK_OPTIONS := --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11

# ── set-up ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The stamp is written last, so that an interrupted set-up starts again. uv knows nothing of pip's settings: a mirror
# given to pip is handed on.
$(INSTALLED): requirements.lock requirements-uv.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo 'make: ibex needs Python 3.11 or newer, and none is on the PATH.' >&2; \
		echo '      Install it, or name one: make PYTHON=/path/to/python3.11 setup' >&2; exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || { \
		echo 'Making $(VENV) with $(PYTHON) …'; $(PYTHON) -m venv --clear $(VENV); }
	@echo 'Installing uv …'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	@if [ -e $(BIN)/ibexctl ]; then echo 'Bringing $(VENV) up to the locks …'; \
	 else echo "Installing $$(grep -c '^[a-z]' requirements.lock) locked packages; chdb alone is half a gigabyte, so this takes a while …"; fi
	@$(INDEX); $(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock && \
	 $(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@
	@echo 'ibex is installed: $(BIN)/ibexctl --help'

# The clients need another OpenAI SDK than ibex's own tests, and nothing of ibex: hence a second environment.
$(CLIENTS)/.installed: requirements-clients.lock | $(INSTALLED)
	@$(INDEX); $(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLIENTS) && \
	 $(BIN)/uv pip install --python $(CLIENTS)/bin/python --require-hashes -r requirements-clients.lock
	@touch $@
