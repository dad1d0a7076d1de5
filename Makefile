# make demo   learns the languages of names           make demo SHORT=1; make demo NAMES="Garcia Müller"
# make test   runs the tests                          make test ARGS="-k gru"; make test WORKERS=2
# make bench  compares times with torch.nn and rivals make bench BENCH="--set packed"; make bench-report
# make docs   builds the documentation as a site in build/site (open index.html there)
# make gpu    checks and times the library on a GPU (docs/gpu-run.md); make gpu-dry rehearses it without
# make selftest   checks and times every layer, and writes a report   make selftest DEVICE=cuda
# make lint, make sanitize, make build, make environment, make clean
#
# Everything runs in the environment VENV. If VENV does not exist, it is made and gets the pinned
# requirements. If it exists, it keeps its torch and gets only the packages that it lacks.

VENV ?= .venv
PYTHON ?= python3
# The number of test processes; with 0 the tests run in pytest's own process.
WORKERS ?= 0

PY := $(VENV)/bin/python
STATE := $(VENV)/.fusedrnn
PYTEST_FLAGS := -q -p no:cacheprovider --durations=15 $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS))
BENCH ?= --set core --rivals torch,ort,openvino,jax
RESULTS ?= benchmarks/results/core.json
# The tests also run the programs of examples/, and tools that people use with torch.nn's layers.
TEST_REQUIREMENTS = $(addprefix $(STATE)/requirements,-dev -examples -ecosystem -docs)
CXX_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# The device of the selftest, and the folder for its report.
DEVICE ?= cuda
REPORT ?= build

# The seconds of the run on a GPU, and the folder for its results.
GPU_SECONDS ?= 400
GPU_OUT ?= build/gpu-$(shell date +%Y%m%d-%H%M%S)

SITE ?= build/site

.PHONY: docs selftest gpu gpu-dry build demo test bench bench-report lint sanitize environment clean

build: $(STATE)/requirements
	$(PY) setup.py -q build_ext --inplace

demo test bench bench-report gpu gpu-dry: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# NAMES goes through the environment, because the shell would misread a name like O'Brien.
demo: export NAMES := $(NAMES)
demo: build
	set -f; $(PY) examples/names.py $(if $(filter-out 0,$(SHORT)),--short) $$NAMES

test: build $(TEST_REQUIREMENTS)
	$(PY) -m pytest $(PYTEST_FLAGS) $(ARGS)

bench: build $(STATE)/requirements-bench
	$(PY) -m benchmarks run $(BENCH) --out $(RESULTS)

bench-report: $(STATE)/requirements-bench
	$(PY) -m benchmarks report benchmarks/results/*.json --docs docs/benchmarks.md --readme README.md

docs: build $(STATE)/requirements-docs
	$(PY) -m sphinx -W --keep-going -q -E -d build/doctrees docs $(SITE)

selftest: build
	@mkdir -p $(REPORT)
	$(PY) -m fusedrnn.selftest --device $(DEVICE) --out $(REPORT) $(if $(filter cpu,$(DEVICE)),--quick)

gpu: build
	$(PY) -m tools.gpu run --out $(GPU_OUT) --seconds $(GPU_SECONDS) --keep

# The kernels are compiled for the interpreter of the tests, which needs pybind11 and numpy.
gpu-dry: build $(STATE)/requirements-dev
	rm -rf build/gpu-dry
	$(PY) -m tools.gpu dry --out build/gpu-dry

lint: $(STATE)/requirements-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES))
	$(PY) -m mypy

sanitize: $(STATE)/requirements
	$(PY) tests/sanitize/run.py

environment: $(TEST_REQUIREMENTS)

clean:
	rm -rf build dist fusedrnn.egg-info fusedrnn/_C.so fusedrnn/_cuda.so

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fusedrnn needs Python 3.10")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STATE)
	@touch $(STATE)/made-by-make

# The tools of requirements-dev.txt need those of requirements.txt.
$(STATE)/requirements-dev: $(STATE)/requirements
$(STATE)/requirements-bench $(STATE)/requirements-examples $(STATE)/requirements-ecosystem \
  $(STATE)/requirements-docs: $(STATE)/requirements-dev

$(STATE)/%: %.txt tools/missing_requirements.py | $(PY)
	@mkdir -p $(STATE)
	@if [ -e $(STATE)/made-by-make ]; then cp $< $@.new; \
	else $(PY) tools/missing_requirements.py $< > $@.new; fi
	@if grep -q '^torch=' $@.new; then \
	  echo "pip installs the torch that its package index has: often a CUDA build, with several GB of"; \
	  echo "libraries. For the CPU build (200 MB) end this with Ctrl+C, then set PIP_EXTRA_INDEX_URL to"; \
	  echo "torch's index of CPU builds, which pytorch.org names, or use an environment that has torch:"; \
	  echo "VENV=path/to/environment"; fi
	@if [ -s $@.new ]; then \
	  echo "installing $< into $(VENV)"; $(PY) -m pip install --disable-pip-version-check -r $@.new; fi
	@mv $@.new $@
