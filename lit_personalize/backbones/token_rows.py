"""Added tokens without a resized embedding matrix.

`AddedRows` hooks the token embedding of a text encoder: ids up to the vocabulary are looked up as
ever, ids beyond it take rows of small parameters that `TokenEmbedding` adapters own. The stock
matrix is never copied, resized or trained, so this works under every sharding strategy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RowSource = Callable[[], Tensor]


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
        self._ids: Tensor | None = None
        self._handles = (
            embedding.register_forward_pre_hook(self._look_up_known),
            embedding.register_forward_hook(self._place_added),
        )

    def add(self, source: RowSource) -> None:
        """Append a source of rows `[n, width]`; its ids follow those added before."""
        self.sources.append(source)

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
        rows = torch.cat([source().to(states) for source in self.sources])  # files' rows are on the CPU, in fp32
        added = ids >= self.first_id
        index = torch.where(added, ids - self.first_id, torch.zeros_like(ids))
        if int(index.max()) >= len(rows):
            raise IndexError(f"token id {int(ids.max())} has no row; {len(rows)} rows were added at {self.first_id}")
        return torch.where(added[..., None], rows[index], states)
