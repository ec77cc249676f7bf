"""Calls that are started from their record give the same bits as others, whatever has changed in between."""

import pytest
import torch

import ringattn
from ringattn.launch.oracle import Result
from tests.gang import ranks_on_gpus, run_ranks

RANKS, BACKEND = ranks_on_gpus()

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(200)]


def layers_and_steps(rank: int, kernel: str, way: dict[str, bool]) -> tuple[int, int]:
    """Two layers, forwards then backwards, step after step with other numbers in the same memory, and a call of another
    shape between steps; how many records there are, and how many results were compared."""
    from ringattn import preparation
    from ringattn.cost import Choice
    from ringattn.executors.call import Schedule
    from ringattn.ranks import group_name, ranks_named

    ranks, records, compared = ranks_named(group_name(None)), 0, 0
    cp = ringattn.ContextParallel(kernel=kernel, executor="pull", deterministic=True)
    leaves = [
        [torch.empty(2, 256, heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
        for _ in range(2)
    ]
    others = [torch.randn(1, 128, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 4, 4)]
    dout = torch.randn(2, 256, 8, 64, dtype=torch.bfloat16, device="cuda")
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for replay in (False, True):
        schedule = Schedule(flags=kernel == "hopper", replay=replay, **way)
        preparation.choose = lambda *_, chosen=schedule: Choice("pull", chosen, "asked for by a test")
        ranks.agreed.clear()
        for step in range(6):
            generator = torch.Generator("cuda").manual_seed(100 * step + rank)
            with torch.no_grad():
                for x in (x for layer in leaves for x in layer):
                    x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
            outs = [cp.attention(*layer, causal=True) for layer in leaves]
            grads = [torch.autograd.grad(outs[number], leaves[number], dout) for number in (1, 0)]
            if step % 2:
                cp.attention(*others, causal=True)
            for number, (out, more) in enumerate(zip(outs, grads[::-1], strict=True)):
                results = [out.detach().clone(), *(x.clone() for x in more)]
                if replay:
                    for name, x, y in zip(Result._fields, results, found[step, number], strict=True):
                        assert torch.equal(x, y), name
                    compared += len(results)
                else:
                    found[step, number] = results
            del outs, grads, results, out, more
        records = sum(x is not None for _, call in ranks.agreed.values() for x in call.replays.values())
    return records, compared


@pytest.mark.parametrize("way", [{}, {"halves": False}, {"at_once": True}], ids=["halves", "last", "at once"])
@pytest.mark.parametrize("kernel", ["hopper", "triton"])
def test_the_same_bits(kernel, way):
    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper GPUs")
    if kernel == "triton" and "at_once" in way:
        pytest.skip("it does not wait for keys")
    for records, compared in run_ranks(RANKS, layers_and_steps, kernel, way, backend=BACKEND, timeout=180):
        assert records > 0
        assert compared == 6 * 2 * 4
