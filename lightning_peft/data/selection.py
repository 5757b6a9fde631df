"""A small set of rows that differ from each other: near-duplicates out, then the most different ones.

LIMA (arXiv 2305.11206) fine-tunes on a thousand examples, chosen by hand for quality and diversity. The diversity can be had by
machine: of the rows that are left after deduplication, each next one is that whose nearest chosen row is farthest away
(Gonzalez, 1985). Quality cannot; look at the rows with ``lightning-peft preview``.

Similarity is that of Jaccard, shared elements over all elements, of the sets of n-grams of words of two rows, estimated by MinHash
(Broder, 1997; the library ``datasketch``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row

PERMUTATIONS = 128
NGRAM = 3
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which are written without spaces: each of their characters is a word here."""
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def select_rows(
    rows: Sequence[Row],
    text_of: Callable[[Row], str],
    bad_rows: BadRows,
    max_similarity: float | None,
    count: int | None,
    seed: int,
) -> list[Row]:
    """Return the rows that are kept, in the order of the file; those left out as duplicates are counted.

    Args:
        rows: the rows to choose from.
        text_of: gives the text of a row.
        bad_rows: told of duplicates.
        max_similarity: rows as similar as this to an earlier one are left out; none if None.
        count: how many rows to choose of the rest; all if None.
        seed: decides the first row that is chosen.
    """
    hashes = minhashes(map(text_of, rows))
    kept = list(range(len(rows)))
    if max_similarity is not None:
        of = duplicates(hashes, max_similarity)
        for number, first in of.items():
            bad_rows.add("duplicate", f"{rows[number].where} is nearly line {rows[first].line}")
        kept = [number for number in kept if number not in of]
    if count is not None and count < len(kept):
        kept = [kept[number] for number in most_different([hashes[number] for number in kept], count, seed)]
    return [rows[number] for number in sorted(kept)]


def minhashes(texts: Iterable[str]) -> list[Any]:
    """Return the MinHash of each text.

    Raises:
        ConfigError: the library ``datasketch`` is not installed.
    """
    return [_hash(_ngrams(text)) for text in texts]


def _hash(grams: set[bytes]) -> Any:
    hashed = _datasketch().MinHash(num_perm=PERMUTATIONS, seed=1)
    if grams:
        hashed.update_batch(sorted(grams))
    return hashed


def _ngrams(text: str) -> set[bytes]:
    words = _WORD.findall(text.lower())
    return {" ".join(words[start : start + NGRAM]).encode() for start in range(max(1, len(words) - NGRAM + 1)) if words}


def duplicates(hashes: Sequence[Any], threshold: float) -> dict[int, int]:
    """Return the numbers of texts that are as similar as ``threshold`` to an earlier one that is kept, with its number."""
    index = _datasketch().MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    found: dict[int, int] = {}
    for number, hashed in enumerate(hashes):
        # The index gives candidates; the estimate decides.
        near = [one for one in index.query(hashed) if hashes[one].jaccard(hashed) >= threshold]
        if near:
            found[number] = min(near)
        else:
            index.insert(number, hashed)
    return found


def most_different(hashes: Sequence[Any], count: int, seed: int = 0) -> list[int]:
    """Return the numbers of ``count`` texts, each as far as can be from those before it.

    Args:
        hashes: MinHash of each text.
        count: how many to choose, at most as many as there are.
        seed: decides the first one.
    """
    import numpy as np

    table = np.stack([hashed.hashvalues for hashed in hashes])  # (texts, permutations)
    chosen = [int(np.random.default_rng(seed).integers(len(table)))]
    nearest = np.zeros(len(table))  # similarity to the nearest chosen text
    while len(chosen) < min(count, len(table)):
        nearest = np.maximum(nearest, (table == table[chosen[-1]]).mean(axis=1))
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
    return chosen


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise ConfigError(
            "rows are compared with the library datasketch, which is not installed: pip install 'lightning-peft[data]'"
        ) from error
    return datasketch
