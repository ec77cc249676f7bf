"""torch's flex context parallelism as a peer. flex_attention itself has no backward on CPUs, so its place is taken by
attention over what its block mask says; everything around it is torch's own."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from ringattn.launch.benchmarks import flex as peer
from ringattn.launch.benchmarks.across import cut
from ringattn.launch.oracle import Case, make_inputs
from tests.gang import run_ranks

DEVICE = torch.device("cpu")
SHAPE = {"seq_len": 1024, "batch": 1, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float64}
MASKS = {
    "causal": Case(causal=True, **SHAPE),
    "none": Case(causal=False, **SHAPE),
    "window": Case(causal=True, window=200, **SHAPE),
    "documents": Case(causal=True, documents=(0, 100, 613, 614, 1024), **SHAPE),
}


def eager(q, k, v, block_mask, enable_gqa):
    """flex_attention, where blocks that the mask leaves out are not seen."""
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows[:, None], keys[None, :])
    blocks = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen & blocks, enable_gqa=enable_gqa)


def attend(rank):
    from torch.distributed.tensor.experimental._context_parallel import _attention

    peer.compiled = lambda: eager
    _attention._compiled_create_block_mask = flex.create_block_mask
    each, found = peer.TorchFlexParallel(), {}
    for name, case in MASKS.items():
        x = cut(each, make_inputs(case, 0, DEVICE), case, rank, 2)
        q, k, v = (tensor.detach().requires_grad_() for tensor in x[:3])
        with each.ready(case, DEVICE):
            out = each.attend(q, k, v, case)
            found[name] = out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout)
    dist.barrier()
    return found


@pytest.mark.timeout(120)
def test_flex_computes_every_mask():
    ranks = run_ranks(2, attend)
    for name, case in MASKS.items():
        x = make_inputs(case, 0, DEVICE)
        q, k, v = (tensor.transpose(1, 2).detach().requires_grad_() for tensor in x[:3])
        position = torch.arange(case.seq_len)
        seen = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool)
        if case.causal:
            seen &= position[:, None] >= position
        if case.window is not None:
            seen &= position[:, None] - position < case.window
        if case.documents is not None:
            document = torch.bucketize(position, torch.tensor(case.documents), right=True)
            seen &= document[:, None] == document
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        expected = out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout.transpose(1, 2))
        layout = peer.TorchFlexParallel().arrange(case, 2)
        for part, right in zip(zip(*(found[name] for found in ranks), strict=True), expected, strict=True):
            torch.testing.assert_close(layout.unshard(part, 2), right)


def test_flex_balances_blocks_of_queries():
    layout = peer.TorchFlexParallel().arrange(MASKS["causal"], 2)
    assert [[run.start // 128 for run in runs] for runs in layout.runs] == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_flex_says_what_it_does_not_take():
    case = MASKS["causal"]
    assert "no backward on CPUs" in str(peer.TorchFlexParallel().refuses(make_inputs(case, 0, DEVICE), case, 2))
