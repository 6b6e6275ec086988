"""The attackers of `elsa_pl.functional` on the tokens of some texts, all of them.

Where tokens are pooled, several share a state: then each attacker answers once for each place among those that do.

Shapes: N tokens, D width, B batch, G groups, C candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from elsa_pl.functional.attacks import alignment_attack, complement_attack, nearest_neighbours
from elsa_pl.functional.inverter import inverter_attack
from elsa_pl.functional.pooling import Pooling, places
from elsa_pl.functional.rotation_attacks import procrustes_attack, refined_attack, signature_attack

_NUM_HIDDEN = 256


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens, text after text.

    Attributes:
        states: [N, D]
        ids: [N]
        texts: number of the text of each. [N]
        passes: number of the pass in which each was sent. [N]
        positions: in the text. [N]
        places: among the tokens that share a state; 0 without pooling. [N]
    """

    states: Tensor
    ids: Tensor
    texts: Tensor
    passes: Tensor
    positions: Tensor
    places: Tensor

    def of(self, chosen: Tensor) -> "Tokens":
        """Some of the rows."""
        return Tokens(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def of_batches(parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]], pooling: Pooling | None) -> "Tokens":
        """Those that are no padding, of states [B, G, D] and their batches; each with the state it has its part in."""
        found, before = [], 0
        for number, (values, batch) in enumerate(parts):
            mask = batch["attention_mask"].bool()
            texts, positions = mask.nonzero().unbind(1)
            groups, within = places(mask.shape[1], pooling)
            found.append(
                Tokens(
                    states=values[texts, groups[positions]].float().detach(),
                    ids=batch["input_ids"][mask],
                    texts=texts + before,
                    passes=torch.full_like(texts, number),
                    positions=positions,
                    places=within[positions],
                )
            )
            before += len(mask)
        return Tokens(*(torch.cat([getattr(tokens, field.name) for tokens in found]) for field in fields(Tokens)))


def guess_tokens(
    seen: Tokens, public: Tokens, known: Tensor, plain: Tensor, subspace: Tensor | None, special: Sequence[int]
) -> dict[str, Tensor]:
    """What each attacker takes the tokens for.

    Args:
        seen: what was sent. Its tokens are not looked at, but for those known.
        public: of public texts, encoded as far as the attackers know how.
        known: which of the tokens the attackers know. [N]
        plain: states of the same texts before anything was done to them; used for those known. [N, D]
        subspace: in which SS-OP turns; None without it.
        special: ids that are never a guess of ``blind``.

    Returns:
        Token ids [N], by attacker.
    """
    blind = _commonest(seen, public, special)
    guesses = {"blind": blind}
    for name, num_hidden in (("inverter", 0), ("inverter, hidden layer", _NUM_HIDDEN)):
        guesses[name] = inverter_attack(*_marked(seen, public), public.ids, num_hidden=num_hidden)
    for place in seen.places.unique():
        own, theirs = seen.places == place, public.places == place
        if min(int((known & own).sum()), int(theirs.sum())) < 2:  # hardly a text is so long
            continue
        compared = _compare(seen.of(own), public.of(theirs), subspace, plain[own], known[own])
        for name, guessed in compared.items():
            guesses.setdefault(name, blind.clone())[own] = guessed
    return guesses


def candidates(seen: Tokens, public: Tokens, guesses: Mapping[str, Tensor], count: int) -> Tensor:
    """The likeliest tokens to a classifier, and two other guesses: where a search of texts starts, and goes on to.

    Args:
        seen: as in `guess_tokens`.
        public: as there.
        guesses: its answer.
        count: of the classifier's.

    Returns:
        [N, `count` + 2]
    """
    marked = _marked(seen, public)
    likely = inverter_attack(*marked, public.ids, num_guesses=count, num_hidden=_NUM_HIDDEN)
    others = [guesses[name] for name in ("nearest", "blind") if name in guesses]
    return torch.cat([likely.view(len(likely), -1), torch.stack(others, 1)], 1)


def _compare(seen: Tokens, public: Tokens, subspace: Tensor | None, plain: Tensor, known: Tensor) -> dict[str, Tensor]:
    """What attackers say that compare states, or what a rotation leaves of them."""
    aimed = (public.states, public.ids)
    guesses = {
        "nearest": nearest_neighbours(seen.states, *aimed),
        "signatures": signature_attack(seen.states, seen.texts, public.states, public.texts, public.ids),
        "alignment": alignment_attack(seen.states, *aimed, subspace),
        "procrustes": procrustes_attack(seen.states, *aimed, seen.states[known], plain[known]),
    }
    guesses["refined"] = refined_attack(seen.states, *aimed, guesses["signatures"])
    apart = torch.empty_like(seen.ids), torch.empty_like(seen.ids)  # for rotations that change with every pass
    for number in seen.passes.unique():
        own = seen.passes == number
        states, texts = seen.states[own], seen.texts[own]
        apart[0][own] = signature_attack(states, texts, public.states, public.texts, public.ids)
        apart[1][own] = refined_attack(states, *aimed, apart[0][own])
    guesses["signatures, by pass"], guesses["refined, by pass"] = apart
    if subspace is not None and subspace.shape[1] < subspace.shape[0]:
        guesses["complement"] = complement_attack(seen.states, *aimed, subspace.detach())
    return guesses


def _commonest(seen: Tokens, public: Tokens, special: Sequence[int]) -> Tensor:
    """The commonest token of public texts at each token's position; of any position, where no text is so long."""
    counted = ~torch.isin(public.ids, torch.tensor(list(special), dtype=torch.long))
    ids, positions = public.ids[counted], public.positions[counted]
    guesses = torch.full_like(seen.ids, int(ids.mode().values))
    for position in positions.unique():
        guesses[seen.positions == position] = ids[positions == position].mode().values
    return guesses


def _marked(seen: Tokens, public: Tokens) -> tuple[Tensor, Tensor]:
    """States, and beside them the places of those tokens that share one."""
    num_places = int(max(seen.places.max(), public.places.max())) + 1
    if num_places == 1:
        return seen.states, public.states
    marked = [
        torch.cat([tokens.states, torch.nn.functional.one_hot(tokens.places, num_places).to(tokens.states)], 1)
        for tokens in (seen, public)
    ]
    return marked[0], marked[1]
