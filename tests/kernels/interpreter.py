"""Triton's interpreter, repaired where it is wrong.

`tl.dot` multiplies bfloat16 operands as the 16-bit integers that hold them, without an error; and
`range` with a bound known only at run time fails under numpy 2.4, which no longer takes an array of one element for
an int.
"""

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

__all__ = ["repair"]


def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """The same numbers in fp32: a bfloat16 is the upper half of an fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def repair() -> None:
    """Patches the interpreter of this process, and lets it divide by zero as quietly as a GPU does."""
    np.seterr(divide="ignore", invalid="ignore")
    assert knobs.runtime.interpret, "triton was imported before the interpreter was chosen"
    multiply, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)  # noqa: B010
    interpreter._patch_lang_tensor = patch_lang_tensor
