"""Added tokens without a resized embedding matrix.

`AddedRows` hooks the token embedding of a text encoder: ids up to the vocabulary are looked up as
ever, ids beyond it take rows of small parameters that `TokenEmbedding` adapters own. The stock
matrix is never copied, resized or trained, so this works under every sharding strategy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lit_personalize.errors import DataError

RowSource = Callable[[], Tensor]
PIECE = re.compile(r"<[^<>\s]+>")


def pieces_of(token: str) -> list[str]:
    """Names of the rows of a token that is written as all of them, such as <s0><s1>; empty for any other token."""
    found = PIECE.findall(token)
    return found if len(found) > 1 and "".join(found) == token else []


def row_names(token: str, count: int) -> list[str]:
    """What the tokenizer calls the rows of a token: `<t>`, `<t>_1`, ... as in diffusers, or the pieces of <s0><s1>.

    Raises:
        DataError: A token of several pieces has another number of rows.
    """
    pieces = pieces_of(token)
    if pieces and len(pieces) != count:
        raise DataError(f"token {token} names {len(pieces)} rows, but has {count}; give it a name of one piece")
    return pieces or [token, *(f"{token}_{i}" for i in range(1, count))]


class AddedRows:
    """Rows for ids >= `first_id` of one text encoder, in the order in which tokens were added."""

    def __init__(self, text_encoder: nn.Module, vocabulary: int):
        embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"{type(text_encoder).__name__}: expected nn.Embedding, found {type(embedding).__name__}")
        if vocabulary > embedding.num_embeddings:
            raise ValueError(f"the tokenizer has {vocabulary} tokens, the text encoder only {embedding.num_embeddings}")
        self.first_id = vocabulary
        self.width = embedding.embedding_dim
        self.sources: list[RowSource] = []
        self.hidden: set[int] = set()
        """Ids that `shown` leaves out."""
        self._ids: Tensor | None = None
        self._handles = (
            embedding.register_forward_pre_hook(self._look_up_known),
            embedding.register_forward_hook(self._place_added),
        )

    def add(self, source: RowSource) -> None:
        """Append a source of rows `[n, width]`; its ids follow those added before.

        A source may give `[G, n, width]`: then the first of G equal shares of the captions takes its first rows, and so
        on (banks).
        """
        self.sources.append(source)

    def hide(self, own: Iterable[int], hidden: Iterable[int]) -> None:
        """Hide some of the ids of one source, and show its others."""
        self.hidden = (self.hidden - set(own)) | set(hidden)

    def shown(self, ids: Tensor, pad: int) -> Tensor:
        """Ids `[B, S]` without the hidden ones: what follows moves up, `pad` fills the end."""
        if not self.hidden:
            return ids
        gone = torch.isin(ids, torch.tensor(sorted(self.hidden), device=ids.device))
        moved = ids.gather(1, gone.to(torch.uint8).argsort(dim=1, stable=True))
        left = torch.arange(ids.shape[1], device=ids.device) < (~gone).sum(dim=1, keepdim=True)
        return torch.where(left, moved, pad)

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _look_up_known(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (ids,) = args
        if not self.sources:
            self._ids = None
            return args
        self._ids = ids
        return (torch.where(ids < self.first_id, ids, torch.zeros_like(ids)),)

    def _place_added(self, module: nn.Module, args: tuple[Tensor], states: Tensor) -> Tensor:
        ids, self._ids = self._ids, None
        if ids is None or not bool((ids >= self.first_id).any()):
            return states
        sources = [source().to(states) for source in self.sources]  # files' rows are on the CPU, in fp32
        shares = max(len(rows) if rows.ndim == 3 else 1 for rows in sources)
        rows_GNW = torch.cat([rows.expand(shares, -1, -1) for rows in sources], dim=1)
        added = ids >= self.first_id
        index = torch.where(added, ids - self.first_id, torch.zeros_like(ids))
        count = rows_GNW.shape[1]
        if int(index.max()) >= count:
            raise IndexError(f"token id {int(ids.max())} has no row; {count} rows were added at {self.first_id}")
        first = torch.arange(shares, device=ids.device).repeat_interleave(len(ids) // shares) * count
        return torch.where(added[..., None], rows_GNW.flatten(0, 1)[first[:, None] + index], states)
