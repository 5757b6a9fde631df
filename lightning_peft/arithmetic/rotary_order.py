"""Two orders of the output features of query and key, which rotary embeddings ask for (Su et al., 2021, arXiv:2104.09864).

::

    halves (transformers)              0  1  2  ...  h/2  h/2+1  ...      feature i turns with feature i + h/2
    pairs (torchtune, llama.cpp)       0  h/2  1  h/2+1  2  ...           feature 2 i turns with feature 2 i + 1

h is the number of features of a head. The scores of attention are the same in both.
"""

from __future__ import annotations

from torch import Tensor


def halves_to_pairs(tensor: Tensor, head_features: int) -> Tensor:
    """Return ``tensor`` (heads * head_features, ...), whose rows are in transformers' order, in the order of pairs.

    Example:
        >>> import torch
        >>> halves_to_pairs(torch.arange(8), 4)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = tensor.reshape(-1, 2, head_features // 2, *tensor.shape[1:])  # (heads, halves, pairs, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


def pairs_to_halves(tensor: Tensor, head_features: int) -> Tensor:
    """Return ``tensor`` (heads * head_features, ...), whose rows are in the order of pairs, in transformers' order.

    Example:
        >>> import torch
        >>> pairs_to_halves(torch.tensor([0, 2, 1, 3]), 4)
        tensor([0, 1, 2, 3])
    """
    pairs = tensor.reshape(-1, head_features // 2, 2, *tensor.shape[1:])  # (heads, pairs, both of a pair, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)
