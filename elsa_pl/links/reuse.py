"""States that have changed little since they were sent need not be sent again.

A client goes through its texts many times, and its front changes slowly (temporal redundancy). So both ends of the
uplink remember the states of a text, in a slot with a number, and the sender says for each text of a pass what it does:

    client                                                      edge
    [1] number the texts of a step
    [2] compare their states with those sent last
    [3] tokens of changed texts, a row each -- next stages --> [4] put them into their places, and keep them
        slots of all texts, [B] ------------------------------> [5] fill in what was kept of the other texts

The gradients of [3] alone come back: the front does not learn from a text that was not sent.

What is kept must not depend on which pass of a step comes first. So a text has a slot in one pass of a step only, and
the next step begins when all passes of this one are done: a slot is never read and written at the same time.

Shapes: B batch, G tokens after pooling, D hidden, n tokens that are sent.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from elsa_pl.links.stages import Ends, Link, Seen, Stage, current_crossing

NO_SLOT = -1


class ReuseStage(Stage):
    """Texts whose states changed little are not sent. Always the first stage, on the uplink.

    Args:
        threshold: relative change below which a text is not sent.
        capacity: slots, at each end, for each client.
    """

    first = True  # what follows sees the tokens that are sent

    def __init__(self, threshold: float, capacity: int) -> None:
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"expected a finite threshold >= 0; got {threshold}")
        if capacity < 1:
            raise ValueError(f"expected a capacity of at least one text; got {capacity}")
        self._threshold, self._capacity = threshold, capacity

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        return Ends(Sender(self._threshold, self._capacity), Receiver(self._capacity), width)

    def pass_on(self, ends: Ends, seen: Seen) -> Seen:
        return seen

    def describe(self) -> str:
        return f"reuse below a relative change of {self._threshold:g}, {self._capacity} slots"


class Memory(nn.Module):
    """What one end remembers.

    Args:
        capacity: slots.

    Attributes:
        kept: states of a text's tokens by slot. [its tokens, D] each
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.kept: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Begin anew; the other end must as well."""
        self.kept = {}

    def take(self, other: "Memory") -> None:
        """Go on with what another end remembers, which is not used any more."""
        self.kept = other.kept


class Sender(Memory):
    """Leaves out texts that changed little.

    Args:
        threshold: relative change, in the Euclidean norm over all tokens of a text.
        capacity: see `Memory`.
    """

    def __init__(self, threshold: float, capacity: int) -> None:
        super().__init__(capacity)
        self._threshold = threshold
        self._numbers: dict[bytes, int] = {}

    def forget(self) -> None:
        super().forget()
        self._numbers = {}

    def take(self, other: Memory) -> None:
        super().take(other)
        assert isinstance(other, Sender)
        self._numbers = other._numbers

    def slots(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Number the texts of a step: the first ones that come get a slot, as long as there are any.

        Args:
            batches: those of all passes, in their order; ``input_ids`` and ``attention_mask`` [B, T].

        Returns:
            For each batch slots, or `NO_SLOT` for a text without one and from the second time on in the step. [B]
        """
        taken: set[int] = set()
        numbered = []
        for batch in batches:
            slots = []
            for text in _digests(batch):
                slot = self._numbers.get(text, NO_SLOT)
                if slot == NO_SLOT and len(self._numbers) < self.capacity:
                    slot = self._numbers[text] = len(self._numbers)
                slots.append(NO_SLOT if slot in taken else slot)
                taken.add(slot)
            numbered.append(torch.tensor(slots, dtype=torch.int32))
        return numbered

    def forward(self, states: Tensor) -> Tensor:
        """[B, G, D] -> [n, D] where the pass has slots; those of texts left out get below `NO_SLOT`."""
        passing = current_crossing()
        if passing.slots is None:
            return states
        assert passing.mask is not None
        mask, slots = passing.mask.to(states.device), passing.slots.tolist()
        now = states.detach()
        for index, slot in enumerate(slots):
            tokens = now[index, mask[index]]
            if slot in self.kept and (tokens - self.kept[slot]).norm() < self._threshold * self.kept[slot].norm():
                slots[index] = _left_out(slot)
            elif slot != NO_SLOT:
                self.kept[slot] = tokens
        passing.slots = torch.tensor(slots, dtype=torch.int32)
        return states[mask & _is_sent(passing.slots).to(mask.device)[:, None]]


class Receiver(Memory):
    """Puts what was sent and what is kept together."""

    def forward(self, rows: Tensor) -> Tensor:
        """[n, D] -> [B, G, D] where the pass has slots; padding becomes 0.

        Raises:
            ValueError: slots beyond the capacity or empty, or another number of tokens than they ask for.
        """
        passing = current_crossing()
        if passing.slots is None:
            return rows
        assert passing.mask is not None
        mask, sent = passing.mask.to(rows.device, torch.bool), _is_sent(passing.slots).to(rows.device)
        places = mask & sent[:, None]
        if rows.shape[:-1] != (expected := (int(places.sum()),)):
            raise ValueError(f"expected tokens {list(expected)}; got {list(rows.shape[:-1])}")
        states = rows.new_zeros(*mask.shape, rows.shape[-1])
        for index, slot in enumerate(passing.slots.tolist()):
            if slot < NO_SLOT:
                states[index, mask[index]] = self._recalled(_left_out(slot), int(mask[index].sum()))
        states[places] = rows
        for index, slot in enumerate(passing.slots.tolist()):
            if slot > NO_SLOT:
                if slot >= self.capacity:
                    raise ValueError(f"expected a slot below the capacity {self.capacity}; got {slot}")
                self.kept[slot] = states.detach()[index, mask[index]]
        return states

    def _recalled(self, slot: int, num_tokens: int) -> Tensor:
        if slot not in self.kept or len(self.kept[slot]) != num_tokens:
            found = f"{len(self.kept[slot])} tokens" if slot in self.kept else "nothing"
            raise ValueError(f"expected the states of {num_tokens} tokens in slot {slot}; got {found}")
        return self.kept[slot]


def _left_out(slot: int) -> int:
    """What stands for a text that was not sent, below `NO_SLOT`; of that again the slot."""
    return NO_SLOT - 1 - slot


def _is_sent(slots: Tensor) -> Tensor:
    return slots >= NO_SLOT


def _digests(batch: Mapping[str, Tensor]) -> list[bytes]:
    """What tells texts apart, whatever their padding."""
    names = [name for name in ("input_ids", "token_type_ids") if name in batch]
    content, masks = torch.stack([batch[name] for name in names]).cpu(), batch["attention_mask"].cpu().bool()
    return [
        hashlib.blake2b(content[:, index, mask].numpy().tobytes(), digest_size=16).digest()
        for index, mask in enumerate(masks)
    ]
