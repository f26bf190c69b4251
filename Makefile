# make quickstart   install everything and align a small real model on this machine
# make test         install everything, check style and types, run all tests
# make help         the other targets

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BUILD ?= cpu
BIN := .venv/bin

.PHONY: help setup quickstart test test-fast lint format doctor lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: ## make .venv and install (BUILD=gpu for NVIDIA GPUs)
	@./setup.sh $(BUILD) dev

quickstart: ## align SmolLM2-135M-Instruct on this machine, whole method
	@./setup.sh $(BUILD)
	@$(BIN)/allo align --config jobs/configs/quickstart.yaml

test: setup lint ## lint, types and all tests
	@$(BIN)/python -m pytest

test-fast: setup ## the tests that take under a minute each
	@$(BIN)/python -m pytest -m 'not slow'

lint: setup ## style (ruff) and types (pyright)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --level error

format: setup ## mend the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

doctor: setup ## check this machine
	@$(BIN)/allo doctor

lock: setup ## write constraints/cpu.txt and dev.txt from what .venv holds
	@$(BIN)/python constraints/lock.py

clean: ## remove the environment and caches; runs and store stay
	rm -rf .venv build ./*.egg-info .pytest_cache .ruff_cache .hypothesis
