"""On a machine without a GPU the Triton kernels run in Triton's interpreter. It is chosen when triton is imported, so
this file, which is read before any test module beside it, chooses it for the whole process."""

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from tests.kernels import interpreter

    interpreter.repair()
