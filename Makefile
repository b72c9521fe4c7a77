# make demo and make test set everything up by themselves; see README.md.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin
# Once the environment is installed nothing here needs a model hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-slow lint format docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.synced: uv.lock pyproject.toml bootstrap.sh
	./bootstrap.sh
	@touch $@

demo: .venv/.synced ## record PushT, precompute LAM tokens, train on them, draw what happened (3 to 7 minutes)
	@echo "Starting; importing LeRobot takes about 20 s ..."
	$(BIN)/lerobot-lam-demo

test: .venv/.synced ## the fast tests
	$(BIN)/pytest -m "not slow" --numprocesses=2 --dist=loadfile

test-slow: .venv/.synced ## spawned processes, fresh environments, whole commands
	$(BIN)/pytest -m slow --numprocesses=2 --dist=loadfile

lint: .venv/.synced ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.synced ## format and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.synced ## what is generated: docs/REFERENCE.md and the commands' --help
	$(BIN)/python docs/generate.py

clean: ## remove the environment and what was made in it
	rm -rf .venv .cache outputs
