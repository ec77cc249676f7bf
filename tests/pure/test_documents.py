"""Documents: every way to name them, and every way to get it wrong."""

from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn.documents import Documents, documents_of, next_token_labels


def test_every_form_of_cu_seqlens_is_the_same_documents():
    forms = (
        [0, 3, 3, 8],
        (0, 3, 8),
        np.array([0, 3, 8], np.int32),
        torch.tensor([0, 3, 8], dtype=torch.int32),
        torch.tensor([0, 3, 8]),
        Documents([0, 3, 8, 8]),
    )
    assert len({documents_of(form) for form in forms}) == 1
    assert documents_of([0, 3]) != documents_of([0, 8])


def test_a_tensor_is_read_once_and_again_when_it_changes(monkeypatch):
    cu_seqlens = torch.tensor([0, 3, 8])
    first = documents_of(cu_seqlens)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("read again"))
    assert documents_of(cu_seqlens) is first
    monkeypatch.undo()
    cu_seqlens[1] = 5
    assert documents_of(cu_seqlens).bounds.tolist() == [0, 5, 8]
    with torch.inference_mode():
        assert documents_of(torch.tensor([0, 3, 8])) == first


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 3], r"got cu_seqlens=\[1, 3\]; it must begin with 0 and never fall"),
        ([0, 5, 3], "never fall"),
        ([], "pass one list of integers"),
        ([[0, 3]], "pass one list of integers"),
        ([0.0, 3.0], "pass one list of integers"),
    ],
)
def test_what_is_no_cu_seqlens_raises(cu_seqlens, message):
    with pytest.raises((ValueError, TypeError), match=message):
        documents_of(cu_seqlens)
    with pytest.raises((ValueError, TypeError), match=message):
        documents_of(torch.tensor(cu_seqlens))


def test_documents_longer_than_the_sequence_raise():
    for layout in ("zigzag", "balanced"):
        with pytest.raises(ValueError, match="got cu_seqlens up to 9 for a sequence of 8 tokens; cu_seqlens counts"):
            ringattn.make_plan(layout, 8, 2, cu_seqlens=[0, 9])


def test_positions_that_restart_become_cu_seqlens():
    assert ringattn.cu_seqlens_from_positions(torch.tensor([[0, 1, 0, 0, 1, 2]] * 2)).tolist() == [0, 2, 3, 6]
    assert ringattn.cu_seqlens_from_positions(torch.tensor([], dtype=torch.int64)).tolist() == [0]
    cu_seqlens = torch.tensor([0, 4, 5, 9])
    positions = documents_of(cu_seqlens).positions(torch.arange(9))
    assert torch.equal(ringattn.cu_seqlens_from_positions(positions), cu_seqlens)


@pytest.mark.parametrize(
    ("position_ids", "message"),
    [
        ([[0, 1], [0, 0]], "rows differ; one cu_seqlens holds for a whole batch"),
        ([0, 1, 5], "got position 5 at token 2, after 1; positions must go on by one or restart at 0"),
        ([2, 3, 0], "got position 2 at token 0, after nothing"),
        ([0.0, 1.0], "pass integers"),
    ],
)
def test_positions_that_do_neither_raise(position_ids, message):
    with pytest.raises(ValueError, match=message):
        ringattn.cu_seqlens_from_positions(torch.tensor(position_ids))


def test_no_label_crosses_a_border():
    ids = torch.arange(10, 22).view(2, 6)
    assert next_token_labels(ids, [0, 2, 2, 5]).tolist() == [
        [11, -100, 13, 14, -100, -100],
        [17, -100, 19, 20, -100, -100],
    ]
    assert next_token_labels(ids[:, :1]).tolist() == [[-100], [-100]]


def test_position_ids_and_the_like_are_refused_with_advice():
    x = torch.zeros(1, 4, 1, 8)
    for name, advice in (("position_ids", "cu_seqlens_from_positions"), ("cu_seqlens_q", "pass cu_seqlens")):
        options: dict[str, Any] = {name: torch.arange(4)}
        with pytest.raises(NotImplementedError, match=advice):
            ringattn.ring_attention(x, x, x, **options)
