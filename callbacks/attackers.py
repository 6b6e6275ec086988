"""The attackers of `elsa_pl.functional` on the tokens of some texts, all of them.

Where tokens are pooled, several share a state: then each attacker answers once for each place among those that do, and
others look at all states of a text at once.

Shapes: N tokens, D width, B batch, T columns, G groups, C candidates, P texts, K numbers of all states of a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_pl.functional.attacks import alignment_attack, answering, complement_attack, nearest_neighbours
from elsa_pl.functional.inverter import inverter_attack
from elsa_pl.functional.pooling import Pooling, places, pool_batch
from elsa_pl.functional.priors import Prior, likeliest, token_prior
from elsa_pl.functional.rotation_attacks import procrustes_attack, refined_attack, signature_attack
from elsa_pl.functional.text_attacks import Texts, nearest_texts_attack, text_classifier_attack

_NUM_HIDDEN = 256


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens, text after text.

    Attributes:
        states: [N, D]
        ids: [N]
        texts: number of the text of each. [N]
        passes: number of the pass in which each was sent. [N]
        positions: in the text, wherever its padding is. [N]
        lengths: the most tokens that its text may have, for all that the link's attention mask shows. [N]
        places: among the tokens that share a state; 0 without pooling. [N]
    """

    states: Tensor
    ids: Tensor
    texts: Tensor
    passes: Tensor
    positions: Tensor
    lengths: Tensor
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
            texts, columns = mask.nonzero().unbind(1)
            groups, within = places(mask.shape[1], pooling)
            shown = pool_batch({"attention_mask": mask}, pooling)["attention_mask"].sum(1)
            group_size = pooling if isinstance(pooling, int) else 1
            found.append(
                Tokens(
                    states=values[texts, groups[columns]].float().detach(),
                    ids=batch["input_ids"][mask],
                    texts=texts + before,
                    passes=torch.full_like(texts, number),
                    positions=(mask.cumsum(1) - 1)[mask],
                    lengths=(1 + group_size * (shown - 1))[texts],
                    places=within[columns],
                )
            )
            before += len(mask)
        return Tokens(*(torch.cat([getattr(tokens, field.name) for tokens in found]) for field in fields(Tokens)))


def whole_texts(seen: Sequence[Tensor], public: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All states of each text side by side, 0 where a text has fewer: [P, K] of both, of batches [B, G, D]."""
    most = max(states.shape[1] for states in (*seen, *public))
    found = [
        torch.cat([F.pad(states.float().detach(), (0, 0, 0, most - states.shape[1])).flatten(1) for states in parts])
        for parts in (seen, public)
    ]
    return found[0], found[1]


@dataclass(frozen=True)
class Known:
    """What attackers know.

    Attributes:
        public: states of public texts, encoded as far as the attackers know how, but without noise.
        noised: the same with noise of their own, as the link adds; None where it adds none.
        special: ids that are never scored, and so never an answer.
        subspace: in which SS-OP turns; None without it. [D, r]
    """

    public: Tokens
    special: Sequence[int]
    noised: Tokens | None = None
    subspace: Tensor | None = None


def guess_tokens(
    seen: Tokens, attacker: Known, known: Tensor, plain: Tensor, whole: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """What each attacker takes the tokens for.

    Args:
        seen: what was sent. Its tokens are not looked at, but for those known.
        attacker: what it knows of public texts and of the link.
        known: which of the tokens the attackers know. [N]
        plain: states of the same texts before anything was done to them; used for those known. [N, D]
        whole: where tokens share states, all states of each seen and public text, see `whole_texts`.

    Returns:
        Token ids [N], by attacker.
    """
    public = attacker.public
    answers = answering(public.ids, attacker.special)
    blind = likeliest(prior_of(seen, public.of(answers)))
    guesses = {"blind": blind}
    # of a model's states, either can be the better teacher: one draw of noise for each token is not many
    for ending, teacher in (("", public), (", noised", attacker.noised)):
        if teacher is None:
            continue
        rows = teacher.of(answers)
        for name, num_hidden in (("inverter", 0), ("inverter, hidden layer", _NUM_HIDDEN)):
            guesses[name + ending] = inverter_attack(*_marked(seen, rows), rows.ids, num_hidden=num_hidden)
    if whole is not None:
        own, theirs = _as_texts(seen, whole[0]), _as_texts(public.of(answers), whole[1])
        ids = public.ids[answers]
        guesses["whole text"] = text_classifier_attack(own, theirs, ids)
        guesses["nearest texts"] = nearest_texts_attack(own, theirs, ids, prior_of(seen, public.of(answers)))
    # what noise adds to each coordinate; states are compared in units of that
    unit = None if attacker.noised is None else (attacker.noised.states - public.states).std(0, correction=0)
    for place in seen.places.unique():
        mine, there = seen.places == place, public.places == place
        if min(int((known & mine).sum()), int((there & answers).sum())) < 2:  # hardly a text is so long
            continue
        compared = _compare(seen.of(mine), public.of(there), attacker, plain[mine], known[mine], unit)
        for name, guessed in compared.items():
            guesses.setdefault(name, blind.clone())[mine] = guessed
    return guesses


def prior_of(seen: Tokens, public: Tokens) -> Prior:
    """How likely public tokens are at the place of each that was seen, with the lengths that the link shows."""
    return token_prior(seen.positions, seen.lengths, (public.positions, public.lengths), public.ids)


def candidates(
    seen: Tokens, attacker: Known, guesses: Mapping[str, Tensor], whole: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """The likeliest tokens to a classifier of whole texts, and other guesses: where a search starts, and goes on to.

    Args:
        seen: as in `guess_tokens`.
        attacker: as there.
        guesses: its answer.
        whole: as there.
        count: of the classifier's.

    Returns:
        No special tokens. [N, C]
    """
    public = attacker.public.of(answering(attacker.public.ids, attacker.special))
    own, theirs = _as_texts(seen, whole[0]), _as_texts(public, whole[1])
    likely = text_classifier_attack(own, theirs, public.ids, num_guesses=count)
    others = [guesses[name] for name in ("nearest texts", "nearest", "blind") if name in guesses]
    return torch.cat([likely.view(len(likely), -1), torch.stack(others, 1)], 1)


def _as_texts(tokens: Tokens, states: Tensor) -> Texts:
    return Texts(states, tokens.texts, tokens.positions)


def _compare(
    seen: Tokens, public: Tokens, attacker: Known, plain: Tensor, known: Tensor, unit: Tensor | None
) -> dict[str, Tensor]:
    """What attackers say that compare states, or what a rotation leaves of them."""
    special, subspace = attacker.special, attacker.subspace
    answers = answering(public.ids, special)
    aimed, everything = (public.states[answers], public.ids[answers]), (public.states, public.ids)

    def by_signatures(rows: Tokens, never: Sequence[int]) -> Tensor:
        return signature_attack(rows.states, rows.texts, public.states, public.texts, public.ids, special=never)

    def refined(rows: Tokens) -> Tensor:
        return refined_attack(rows.states, *everything, by_signatures(rows, ()), special=special)

    guesses = {
        "nearest": nearest_neighbours(seen.states, *aimed),
        "signatures": by_signatures(seen, special),
        "alignment": alignment_attack(seen.states, *everything, subspace, special=special),
        "procrustes": procrustes_attack(seen.states, *aimed, seen.states[known], plain[known]),
        "refined": refined(seen),
    }
    if unit is not None:
        scale = torch.where(unit > 0, unit, unit.max())
        guesses["nearest, in units of noise"] = nearest_neighbours(seen.states / scale, aimed[0] / scale, aimed[1])
    apart = torch.empty_like(seen.ids), torch.empty_like(seen.ids)  # for rotations that change with every pass
    for number in seen.passes.unique():
        own = seen.passes == number
        apart[0][own] = by_signatures(seen.of(own), special)
        apart[1][own] = refined(seen.of(own))
    guesses["signatures, by pass"], guesses["refined, by pass"] = apart
    if subspace is not None and subspace.shape[1] < subspace.shape[0]:
        guesses["complement"] = complement_attack(seen.states, *aimed, subspace.detach())
    return guesses


def _marked(seen: Tokens, public: Tokens) -> tuple[Tensor, Tensor]:
    """States, and beside them the places of those tokens that share one."""
    num_places = int(max(seen.places.max(), public.places.max())) + 1
    if num_places == 1:
        return seen.states, public.states
    marked = [
        torch.cat([tokens.states, F.one_hot(tokens.places, num_places).to(tokens.states)], 1)
        for tokens in (seen, public)
    ]
    return marked[0], marked[1]
