"""Which regions of symmetric memory there are, whatever is asked for; memory that is mapped needs GPUs."""

import torch

from ringattn.transport.symmetric import ALIGNMENT, Mapped, SymmetricMemory


def test_there_are_regions_even_where_nothing_will_be_brought():
    """As with documents that no other rank looks at, when they come before all others."""
    memory = SymmetricMemory.__new__(SymmetricMemory)
    memory.sizes, memory.regions, memory.known, memory.generation = (), [], {}, 0
    memory.barrier = lambda name: None
    memory.map = lambda nbytes: Mapped(None, [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)])
    memory.reserve((0, 0, 0))
    assert [memory.region(rank, index).numel() for rank in range(2) for index in range(3)] == [ALIGNMENT] * 6
    memory.reserve((0, ALIGNMENT, 1))
    assert memory.generation == 1
    memory.reserve((0, ALIGNMENT + 1, 0))
    assert memory.generation == 2
    assert memory.sizes == (ALIGNMENT, 2 * ALIGNMENT, ALIGNMENT)
