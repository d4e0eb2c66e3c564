"""Text states of captions that nothing trains: encoded once, kept in memory, and in a store that runs share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_personalize.backbones.base import Base

MOST_IN_MEMORY = 4096
PER_FILE = 64
"""States that are put into a store at once."""
States = tuple[Tensor, Tensor | None]
"""Of one caption: `[S, E]`, and pooled `[P]` where the family has it."""


class StateStore(Protocol):
    """Named tensors under keys, on disk."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> dict[str, Tensor]: ...

    def put(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None: ...


class TextStates:
    """States by ids.

    Every caption is encoded by itself: encoded together, its states would depend in the last bit on the others, which
    a resumed run meets in another order.
    """

    def __init__(self) -> None:
        self._memory: dict[bytes, States] = {}
        self._store: StateStore | None = None

    @torch.no_grad()
    def of(self, base: Base, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """States `[B, S, E]` and pooled `[B, P]` of ids, one `[B, S]` per tokenizer."""
        if len(self._memory) > MOST_IN_MEMORY:
            self._memory.clear()
        keys = [_bytes_of(ids, row) for row in range(len(ids[0]))]
        for row, key in enumerate(keys):
            if key not in self._memory:
                self._memory[key] = self._stored(base, key) or _encoded(base, [i[row : row + 1] for i in ids])
        found = [self._memory[key] for key in keys]
        pooled = [p for _, p in found if p is not None]
        return torch.stack([states for states, _ in found]), torch.stack(pooled) if pooled else None

    @torch.no_grad()
    def keep(self, base: Base, captions: Sequence[str], store: StateStore) -> tuple[int, int]:
        """Look states up in a store from now on, and put those of `captions` into it that it lacks.

        They are named by ids, and by weights and precision of the text encoders.

        Returns:
            How many captions were known, and how many were encoded.
        """
        self._store = store
        new: dict[str, dict[str, Tensor]] = {}
        encoded = 0
        for caption in captions:
            ids = [i.to(base.device) for i in base.tokenize([caption])]
            name = _name(base, _bytes_of(ids, 0))
            if name in store or name in new:
                continue
            states, pooled = _encoded(base, ids)
            new[name] = {"states": states.cpu()} | ({} if pooled is None else {"pooled": pooled.cpu()})
            encoded += 1
            if len(new) == PER_FILE:
                store.put(new)
                new = {}
        store.put(new)
        return len(captions) - encoded, encoded

    def _stored(self, base: Base, key: bytes) -> States | None:
        if self._store is None or (name := _name(base, key)) not in self._store:
            return None
        entry = {part: tensor.to(base.device) for part, tensor in self._store.get(name).items()}
        return entry["states"], entry.get("pooled")


def _bytes_of(ids: Sequence[Tensor], row: int) -> bytes:
    return b"".join(i[row].cpu().numpy().tobytes() for i in ids)


def _name(base: Base, key: bytes) -> str:
    return hashlib.sha256(b"states 1 " + base.text_identity.encode() + key).hexdigest()[:40]


def _encoded(base: Base, ids: Sequence[Tensor]) -> States:
    states, pooled = base.encode_text(ids)
    return states[0], None if pooled is None else pooled[0]
