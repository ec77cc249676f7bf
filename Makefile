# make demo    set up, train a small model on every GPU (2 CPU ranks without one), and again on one rank
# make test    set up, run the tests
# make lint    set up, run the linters
#
# Set-up makes .venv once and installs ringattn into it, editable. PYTHON chooses the interpreter.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint .venv/constraints.txt

# The folder that holds $(PYTHON)'s torch, printed only if that torch sees a GPU.
FIND_CUDA_TORCH := import torch; assert torch.cuda.is_available(); print(torch.__path__[0].rpartition("/")[0])
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# The kernels are also compiled under these: what torch 2.13 asks for on CUDA, and the newest. The oldest that we
# support runs the tests and stands in constraints.txt.
TRITONS := 3.7.1 3.9.0

.PHONY: demo test lint

demo: .venv/tests
	$(PY) -m ringattn.launch.demo

test: .venv/tests $(TRITONS:%=.venv/tritons/%)
	RINGATTN_TRITONS=$(CURDIR)/.venv/tritons $(PY) -m pytest

lint: .venv/linters
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

# Which torch? One that already sees a GPU is kept: .venv looks into its folder, and pip adds only what is missing.
# A GPU without such a torch gets PyPI's, which is built for CUDA. Both leave every version open. Any other machine
# gets the pinned CPU build, from where pip is configured to look or else from PyTorch's own index.
.venv/constraints.txt: constraints.txt
	@if site=$$($(PYTHON) -c '$(FIND_CUDA_TORCH)' 2>/dev/null); then \
		echo "Setting up .venv around the torch in $$site"; \
		$(PYTHON) -m venv --system-site-packages .venv && \
		echo "$$site" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cuda_torch.pth" && \
		: >$@; \
	elif nvidia-smi --list-gpus >/dev/null 2>&1; then \
		echo "Setting up .venv for CUDA"; \
		$(PYTHON) -m venv .venv && : >$@; \
	else \
		echo "Setting up .venv for CPUs"; \
		$(PYTHON) -m venv .venv && \
		{ $(PIP) install --constraint $< torch 2>/dev/null || \
		  $(PIP) install --constraint $< torch --extra-index-url $(CPU_WHEELS); } && \
		cp $< $@; \
	fi

# Without build isolation nothing is fetched that is there already, so a machine without a network can do this too.
.venv/tests: .venv/constraints.txt pyproject.toml
	$(INSTALL) 'setuptools>=77'
	$(INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

# A release that cannot be had, as on a GPU machine without a network, is left out aloud; in CI that is an error.
.venv/tritons/%: | .venv/tests
	@rm -rf .venv/unpacked-$* && mkdir -p $(@D) && \
	if $(PIP) install --no-deps --target .venv/unpacked-$* triton==$*; then \
		mv .venv/unpacked-$* $@; \
	else \
		echo "triton $* cannot be installed: the tests do not compile the kernels under it"; \
		test "$$CI" != true; \
	fi

.venv/linters: .venv/tests
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
