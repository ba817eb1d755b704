"""What a token of a row sees: of its document, of what stands before it, of no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lavis.common.device import to_device
from lavis.common.errors import ConfigError

KeysAndValues = tuple[Tensor, Tensor]
Keep = Callable[["Asked"], "Tensor | None"]
"""Takes a layer's queries, keys and values where they outlive the pass. Returns what the queries
see, (1, T, heads, head_dim), or ``None`` if they see nothing but their document."""


@dataclass(frozen=True)
class Softmax:
    """How scores become probabilities.

    Attributes:
        scaling: of the scores; ``None`` is one over the root of the head's width.
        dropout: of the probabilities.
        softcap: scores s become c tanh(s / c).
        sinks: (heads,), scores of a position that has no value.
    """

    scaling: float | None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether fused kernels know it."""
        return self.softcap is None and self.sinks is None


class Asked(NamedTuple):
    """What a layer asks of attention.

    Attributes:
        module: the layer's.
        query, key, value: (1, heads, T, head_dim).
        rule: what a token sees, if the family says so.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    rule: MaskRule | None
    softmax: Softmax

    @property
    def layer(self) -> int:
        """The layer's number."""
        number: Any = self.module.layer_idx
        return int(number)


@dataclass(frozen=True)
class Layout:
    """Where the documents of a row lie when each one's keys follow the prefix's.

    Attributes:
        queries: (D + 1,) int32 cumulative lengths.
        keys: the same with P more for each document.
        before: (D * P + T,) int64, which key of the prefix is there; 0 where the row's own are.
        own: (T,) int64, where those are.
    """

    queries: Tensor
    keys: Tensor
    before: Tensor
    own: Tensor


class Documents:
    """What attention must know of a packed row.

    One object for all layers, which keeps what they share. No dataclass: FSDP2 looks into those,
    and would give each layer a copy.

    Attributes:
        lengths: tokens of each document in the row, T in all.
        prefix: each layer's keys and values, (1, heads, P, head_dim), of the P tokens that stand
            before every document; empty without.
        square: mask the square over all documents instead of attending apart.
        keep: keeps keys and values, for documents that go on in another pass.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        prefix: tuple[KeysAndValues, ...] = (),
        square: bool = False,
        keep: Keep | None = None,
    ) -> None:
        self.lengths, self.prefix, self.square, self.keep = lengths, prefix, square, keep
        self._layouts: dict[torch.device, Layout] = {}

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    @cached_property
    def causal(self) -> Masks:
        """Every token sees all that stands before it in its document."""
        return Masks(self, dict.fromkeys(self.lengths))

    def layout(self, device: torch.device) -> Layout:
        """Where the documents lie, made once for all layers of a device."""
        if device not in self._layouts:
            p = self.prefix_length
            queries, keys = ([0, *accumulate(n + q for n in self.lengths)] for q in (0, p))
            inside = torch.cat([torch.arange(p + n) for n in self.lengths])
            self._layouts[device] = Layout(
                to_device(torch.tensor(queries, dtype=torch.int32), device),
                to_device(torch.tensor(keys, dtype=torch.int32), device),
                to_device(inside.where(inside < p, 0), device),
                to_device((inside >= p).nonzero()[:, 0], device),
            )
        return self._layouts[device]


class Masks:
    """What the tokens of a row's documents see, made once for all layers.

    Attributes:
        plain: whether all masks are causal and nothing more, so that kernels need none.
    """

    def __init__(self, documents: Documents, sees: Mapping[int, Tensor | None]) -> None:
        """Take (N, P + N) bool masks by the documents' lengths N; ``None`` is causal."""
        self._documents = documents
        self._sees = sees
        self.plain = all(mask is None for mask in sees.values())
        self._causal: dict[tuple[int, torch.device], Tensor] = {}
        self._squares: dict[torch.device, Tensor] = {}

    def of(self, length: int, device: torch.device) -> Tensor:
        """(N, P + N) bool: what a document's N tokens see of the prefix and of themselves."""
        mask = self._sees[length]
        if mask is not None:
            return mask
        if (length, device) not in self._causal:
            self._causal[length, device] = _causal(length, self._documents.prefix_length, device)
        return self._causal[length, device]

    def square(self, device: torch.device) -> Tensor:
        """(T, P + T) bool: what each token of the row sees."""
        if device not in self._squares:
            each = [self.of(n, device) for n in self._documents.lengths]
            before = torch.cat([m[:, : self._documents.prefix_length] for m in each])
            own = torch.block_diag(*(m[:, self._documents.prefix_length :] for m in each))
            self._squares[device] = torch.cat([before, own.bool()], 1)
        return self._squares[device]


class MaskRule:
    """A mask that a family asked for, not made yet: attention may not need it.

    Families say here, and nowhere else reliably, what a token sees: windows, chunks. The rule is a
    function of two positions, so it also says what a token sees inside its document.
    """

    def __init__(self, **arguments: Any) -> None:
        """Take what Transformers gives to the functions that make masks."""
        self._arguments = arguments
        self._inside: dict[int, Masks] = {}
        self._seen: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """How many keys there are; what follows them in a cache's buffer is room."""
        return int(self._arguments["kv_length"])

    @property
    def causal(self) -> bool:
        """Whether a token sees all that stands before it."""
        return self._arguments["mask_function"] is causal_mask_function

    @cached_property
    def whole(self) -> Tensor | None:
        """(B, 1, N, K) bool, or ``None`` for what SDPA does without a mask."""
        return sdpa_mask(**self._arguments)

    @cached_property
    def explicit(self) -> Tensor:
        """(B, 1, N, K) bool, also where SDPA would need none."""
        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(**(self._arguments | never))
        return mask

    def seen(self, positions: Tensor, keys: int) -> Tensor:
        """(N, 1, 1, K) bool: what tokens at (N,) positions, each of another row, see of its K keys.

        Made once for all layers; positions are those of one pass.
        """
        if keys not in self._seen:
            offsets = positions - torch.arange(len(positions), device=positions.device)
            mask = self._make(len(positions), keys, offsets, positions.device)
            self._seen[keys] = mask[:, None, None]
        return self._seen[keys]

    def inside(self, documents: Documents) -> Masks:
        """The rule applied to each document of a row, with the prefix before it.

        Raises:
            ConfigError: the rule is of positions in the row, not in the document.
        """
        if self._arguments["attention_mask"] is None:  # Transformers looked for documents itself
            raise ConfigError("documents need an attention mask of ones beside them")
        if self.causal:
            return documents.causal
        if id(documents) not in self._inside:  # one in a forward pass
            sees = {n: self._sees(n, documents.prefix_length) for n in set(documents.lengths)}
            self._inside[id(documents)] = Masks(documents, sees)
        return self._inside[id(documents)]

    def _sees(self, length: int, before: int) -> Tensor | None:
        """(N, P + N), or ``None`` for a document that is shorter than windows and chunks."""
        mask = self._make(length, before + length, before, self._arguments["device"])
        return None if mask.equal(_causal(length, before, mask.device)) else mask

    def _make(self, queries: int, keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
        """(N, K) bool: what N tokens, whose positions are ``offset`` and on, see of K keys."""
        mask: Tensor = sdpa_mask(
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=offset,
            mask_function=self._arguments["mask_function"],
            use_vmap=self._arguments["use_vmap"],
            device=device,
            allow_is_causal_skip=False,
        )
        return mask[0, 0]


def _causal(length: int, before: int, device: torch.device) -> Tensor:
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril_(before)
