# Everything a user or maintainer types. Needs Python 3.11 or newer and make; nothing else.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
.DEFAULT_GOAL := help
IMAGES := control-plane gateway ingestor embedder trainer merger quantizer evaluator deployer model-server:cpu
.PHONY: help setup setup-dev demo up down status base test lint format types unit compose-demo compose-test k8s-check \
	images image-sizes sbom locks clean

help: ## List these commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make the environments (quick when nothing has changed; TORCH=cuda for GPU builds)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) scripts/setup.py

setup-dev:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make test PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) scripts/setup.py --dev

demo: setup ## Run the whole line on this machine: train, serve, ask; ARGS="--fresh" makes all again
	@$(BIN)/parampara demo $(ARGS)

up: setup ## Start the stack and keep it up until Ctrl-C; ARGS="--auto-ports" where ports are taken
	@$(BIN)/parampara up $(ARGS)

down: ## Stop a stack that runs elsewhere on the same folder
	@$(BIN)/parampara down

status: ## Show the processes of the running stack
	@$(BIN)/parampara status

base: setup ## Pretrain the demo's small base model again
	@$(BIN)/python examples/kp/pretrain.py $(ARGS)

compose-demo: ## Build the images, start the composed stack and run the demo through its published port; needs Docker
	@$(PYTHON) scripts/compose_demo.py $(ARGS)

compose-test: setup-dev ## Test the composed stack's failures: wrong settings, full volumes, killed containers; needs Docker
	@$(BIN)/python -m pytest -m containers tests/containers $(ARGS)

test: setup-dev lint types unit ## Check style, types and imports, and run every test that needs no GPU

lint:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_sizes.py

types:
	@$(BIN)/pyright

unit: # two processes: a file's tests stay together, since many share a trained model or a server
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not containers" $(ARGS)

k8s-check: setup-dev ## Render the Kubernetes manifests and check them: schemas, rules, references, the code (needs kustomize or kubectl)
	@$(BIN)/python scripts/k8s_check.py
	@$(BIN)/python -m pytest -q tests/deploy/test_k8s.py tests/deploy/test_k8s_code.py tests/deploy/test_k8s_scaling.py

format: setup-dev ## Format the code and sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

images: ## Build every image of compose.yaml, stamped with the commit
	@REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) docker compose build $(ARGS)

image-sizes: ## Print what each image adds to its base image, as docker/README.md shows it
	@$(PYTHON) scripts/image_sizes.py

sbom: ## Write a CycloneDX bill of materials of each built image to sbom/
	@set -e; for image in $(IMAGES); do \
		docker build --quiet --file docker/sbom.Dockerfile --build-arg IMAGE=parampara/$$image --target sbom --output sbom/$${image%%:*} .; \
	done
	@ls sbom/*/*.cdx.json

locks: setup-dev ## Resolve the images' packages again (docker/**/*.txt); ARGS=--upgrade takes newer versions
	@$(BIN)/python scripts/locks.py $(ARGS)

clean: ## Remove the environments and caches; the state in .parampara stays
	rm -rf .venv .venv-vllm .venv-client .venv-llmcompressor .venv-lmeval .pytest_cache .ruff_cache .hypothesis .import_linter_cache build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -not -path './.git/*' -prune -exec rm -rf {} +
