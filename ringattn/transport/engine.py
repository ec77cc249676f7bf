"""What symmetric memory asks of CUDA and torch has no call for, or a slow one: each of these starts no kernel.

    put         cudaMemcpy(2D)Async: a copy engine carries a part of a tensor to where it belongs
    mark        cuStreamBatchMemOp: words that say how far a stream has come
    Recording   a CUDA graph of a whole call, whose words are others at each start

Source: cuda.bindings, which torch on CUDA brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.transport.interface import Put, TransportError

__all__ = ["Engine", "Operation", "Recording"]

Operation = Callable[[Sequence[int], int, int], object]  # takes tensors' addresses, the number of calls and a stream


class Engine:
    """What torch has no call for, or a slow one: each of these starts no kernel."""

    def __init__(self) -> None:
        from cuda.bindings import driver, runtime  # pyright: ignore[reportMissingImports]  # torch on CUDA brings them

        self.driver, self.runtime = driver, runtime
        self.any_direction = runtime.cudaMemcpyKind.cudaMemcpyDefault
        self.recorded: list[tuple[Any, list[Any]]] | None = None  # nodes that write words, and what they write

    def enter(self) -> None:
        """Makes CUDA usable in a thread that has not used it yet, as autograd's may not have: torch and the runtime do
        that by themselves, the driver does not."""
        if not int(checked(self.driver.cuCtxGetCurrent())[1]):
            checked(self.runtime.cudaFree(0))

    def put(self, put: Put, tensors: Sequence[Tensor]) -> Operation:
        """The copy of a part of such a tensor, wherever it will then lie."""
        number, destination = put.number, put.destination
        source = tensors[number][put.part]
        size, kind = source.element_size(), self.any_direction
        to, offset = destination.data_ptr(), source.data_ptr() - tensors[number].data_ptr()
        if destination.is_contiguous() and source.is_contiguous():
            nbytes, copy = source.numel() * size, self.runtime.cudaMemcpyAsync
            return lambda bases, _count, stream: checked(copy(to, bases[number] + offset, nbytes, kind, stream))
        rows, width, copy = source.shape[0], source[0].numel() * size, self.runtime.cudaMemcpy2DAsync
        there, here = destination.stride(0) * size, source.stride(0) * size
        return lambda bases, _count, stream: checked(
            copy(to, there, bases[number] + offset, here, width, rows, kind, stream)
        )

    def mark(self, *words: Tensor) -> Operation:
        """Writes words of 32 bits, once all that the stream holds is visible."""
        writes = [self.write(x.data_ptr() + 4 * index) for x in words for index in range(x.numel())]

        def run(_bases: Sequence[int], count: int, stream: int) -> None:
            for write in writes:
                write.writeValue.value = count
            checked(self.driver.cuStreamBatchMemOp(stream, len(writes), writes, 0))
            if self.recorded is not None:
                node = checked(self.driver.cuStreamGetCaptureInfo(stream))[4][-1]
                self.recorded.append((node, writes))

        return run

    def write(self, address: int) -> Any:
        kind = self.driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
        write = self.driver.CUstreamBatchMemOpParams()
        write.operation = write.writeValue.operation = kind
        write.writeValue.address = self.driver.CUdeviceptr(address)
        return write


class Recording:
    """What a call starts, as a CUDA graph, and the words written in it, which are others at each call."""

    def __init__(self, driver: Any, graph: torch.cuda.CUDAGraph, marks: Sequence[tuple[Any, list[Any]]]):
        self.driver, self.graph = driver, graph  # the graph keeps its memory
        self.context = checked(driver.cuCtxGetCurrent())[1]
        self.started = checked(driver.cuGraphInstantiate(graph.raw_cuda_graph(), 0))[1]
        self.marks = [(node, writes, self.parameters(writes)) for node, writes in marks]

    def parameters(self, writes: list[Any]) -> Any:
        found = self.driver.CUDA_BATCH_MEM_OP_NODE_PARAMS()
        found.ctx, found.count, found.paramArray, found.flags = self.context, len(writes), writes, 0
        return found

    def start(self, count: int, stream: int) -> None:
        """Everything, on a stream, as the call of this number."""
        driver = self.driver
        for node, writes, parameters in self.marks:
            for write in writes:
                write.writeValue.value = count
            parameters.paramArray = writes
            checked(driver.cuGraphExecBatchMemOpNodeSetParams(self.started, node, parameters))
        checked(driver.cuGraphLaunch(self.started, stream))

    def __del__(self) -> None:
        self.driver.cuGraphExecDestroy(self.started)


def checked(answer: tuple) -> tuple:
    if answer[0]:
        raise TransportError(f"CUDA refused: {answer[0].name}")
    return answer
