"""Documents packed end to end into one sequence: where each begins, as `cu_seqlens` or as positions that restart.

`cu_seqlens`, as flash-attn calls it, holds the cumulative lengths: document i is tokens cu_seqlens[i] up to
cu_seqlens[i + 1] of the whole sequence, whatever rank holds them. Documents may be of any length, also empty. Tokens
after the last one are padding: they see nothing and nobody sees them. (Append the length of the sequence to make them
a document of their own.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["IGNORED", "CuSeqlens", "Documents", "cu_seqlens_from_positions", "documents_of", "next_token_labels"]

IGNORED = -100  # the label that torch's cross_entropy leaves out


class Documents:
    """Where documents begin and end, checked and hashed once; equal documents are equal objects in any dictionary.

    Attributes:
        bounds (np.ndarray): int64, increasing: the first token of each document that is not empty, and the end of the
            last one.
        digest (str): names the bounds.

    Raises:
        ValueError, TypeError: cu_seqlens is no list of cumulative lengths.

    Example:
        >>> Documents([0, 3, 3, 8]).bounds.tolist()
        [0, 3, 8]
    """

    def __init__(self, cu_seqlens: Sequence[int] | np.ndarray):
        given = np.asarray(cu_seqlens)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise TypeError(
                f"got cu_seqlens of shape {given.shape} and dtype {given.dtype}; pass one list of integers: "
                "0, the length of the first document, the length of the first two, ..."
            )
        given = given.astype(np.int64)
        if given[0] != 0 or (given[1:] < given[:-1]).any():
            raise ValueError(f"got cu_seqlens={brief(given)}; it must begin with 0 and never fall")
        self.bounds = given[np.append(True, given[1:] > given[:-1])]
        self.digest = hashlib.blake2b(self.bounds.tobytes(), digest_size=8).hexdigest()
        self._hash = int(self.digest, 16)

    @property
    def count(self) -> int:
        """Documents that are not empty."""
        return len(self.bounds) - 1

    @property
    def end(self) -> int:
        """Tokens in all documents; what comes after is padding."""
        return int(self.bounds[-1])

    @cached_property
    def tensor(self) -> Tensor:
        """cu_seqlens as operators take it: int64, on the CPU."""
        return torch.from_numpy(self.bounds)

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions within the document of tokens by their place in the sequence; padding counts as one more.

        Example:
            >>> Documents([0, 3, 5]).positions(torch.arange(7)).tolist()
            [0, 1, 2, 0, 1, 0, 1]
        """
        return tokens - self.tensor[torch.searchsorted(self.tensor, tokens, right=True) - 1]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Documents) and self.digest == other.digest)

    def __repr__(self) -> str:
        return f"{self} of {self.end} tokens in all, {self.digest}"

    def __str__(self) -> str:
        return f"{self.count} document" + "s" * (self.count != 1)


CuSeqlens = Sequence[int] | np.ndarray | Tensor | Documents

_by_tensor = WeakIdKeyDictionary()  # tensor -> (its version, Documents): attention layers all get the same one
_by_content: OrderedDict[bytes, Documents] = OrderedDict()
KEPT = 64  # contents that are remembered


def documents_of(cu_seqlens: CuSeqlens) -> Documents:
    """The documents of cu_seqlens in any form. A tensor is read once, and a GPU's so waited for once."""
    if isinstance(cu_seqlens, Documents):
        return cu_seqlens
    if not isinstance(cu_seqlens, Tensor):
        return by_content(np.asarray(cu_seqlens))
    if cu_seqlens.is_inference():  # keeps no version
        return by_content(cu_seqlens.cpu().numpy())
    known = _by_tensor.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = cu_seqlens._version, by_content(cu_seqlens.detach().cpu().numpy())
        _by_tensor[cu_seqlens] = known
    return known[1]


def by_content(given: np.ndarray) -> Documents:
    key = given.dtype.char.encode() + repr(given.shape).encode() + given.tobytes()
    documents = _by_content.pop(key, None) or Documents(given)
    _by_content[key] = documents
    if len(_by_content) > KEPT:
        _by_content.popitem(last=False)
    return documents


def cu_seqlens_from_positions(position_ids: Tensor) -> Tensor:
    """The cu_seqlens of positions that restart at 0 where a document begins.

    Args:
        position_ids (Tensor): integers [S], or [B, S] with equal rows, of the whole sequence.

    Returns:
        int64 [documents + 1], on the CPU.

    Raises:
        ValueError: rows differ, or positions neither go on by one nor restart at 0.

    Example:
        >>> cu_seqlens_from_positions(torch.tensor([0, 1, 2, 0, 0, 1])).tolist()
        [0, 3, 4, 6]
    """
    rows = position_ids.detach().cpu()
    rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[0] == 0 or rows.is_floating_point():
        raise ValueError(f"got position_ids {tuple(position_ids.shape)} of {position_ids.dtype}; pass integers [S]")
    if (rows != rows[0]).any():
        raise ValueError(
            "got position_ids whose rows differ; one cu_seqlens holds for a whole batch: put the rows end to end, "
            "in a batch of 1"
        )
    ids = rows[0].long()
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1] + 1
    wrong = (begins & (ids != 0)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"got position {int(ids[at])} at token {at}, after {int(ids[at - 1]) if at else 'nothing'}; positions must "
            "go on by one or restart at 0"
        )
    return torch.cat((begins.nonzero().flatten(), torch.tensor([len(ids)])))


def next_token_labels(ids: Tensor, cu_seqlens: CuSeqlens | None = None, ignored: int = IGNORED) -> Tensor:
    """What each token is to predict, on the whole sequence, before it is cut: the next token of its document.

    Args:
        ids (Tensor): [..., S] token ids.
        ignored: the label of the last token of a document and of padding.

    Example:
        >>> next_token_labels(torch.tensor([5, 6, 7, 8, 9]), [0, 3, 4]).tolist()  # the last one is padding
        [6, 7, -100, -100, -100]
    """
    labels = torch.full_like(ids, ignored)
    labels[..., :-1] = ids[..., 1:]
    if cu_seqlens is not None:
        documents = documents_of(cu_seqlens)
        labels[..., torch.from_numpy(documents.bounds[1:] - 1).to(ids.device)] = ignored
        labels[..., documents.end :] = ignored
    return labels


def brief(values: np.ndarray) -> str:
    shown = values.tolist()
    return str(shown) if len(shown) <= 8 else f"[{', '.join(map(str, shown[:6]))}, ..., {shown[-1]}]"
