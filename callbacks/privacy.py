"""How much of the texts a run gives away: the attacks of `elsa_pl.functional` on what links really carry.

Two readers are told apart. The *edge* decodes the uplink, with the secret where SS-OP is undone there. The *link* reads
what passes and decodes it with all that is public, so without the secret. Without a secret at the edge the two see the
same.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.callbacks.attackers import Known, Tokens, candidates, guess_tokens, prior_of, whole_texts
from elsa_pl.callbacks.communication import CommunicationMonitor
from elsa_pl.callbacks.drawing import new_figure, save, style, title
from elsa_pl.callbacks.exposure import Exposure, check_place, expose_client, expose_module, public_batches
from elsa_pl.callbacks.probing import agree, companion, is_federated, log_agreed, submodule
from elsa_pl.errors import ConfigurationError, RemoteError
from elsa_pl.functional.attacks import answering
from elsa_pl.functional.label_attacks import label_clusters, matched_share, shuffled_share
from elsa_pl.functional.recovery import best_of_all, cap, majority_floor
from elsa_pl.functional.search import search_attack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_Found = dict[tuple[str, str], tuple[float, float | None, float | None]]
"""Share, floor and cap, by reader and attack."""
_COLUMNS = ["round", "reader", "what", "share", "floor", "cap", "accuracy", "bytes"]


class PrivacyAudit(Callback):
    """Attacks the uplink of one client on held-out texts after a round, and reports the best attacker.

    ``privacy.csv`` has, by round and reader, the share of tokens that each attack recovers (special tokens do not
    count), next to the floor (guessing the commonest), the cap (tokens that occur in public text at all), accuracy and
    bytes so far; and the share of labels that clusters of what the edge sees agree with, whose floor is the commonest
    label's share; ``shuffled`` is what the same clusters get of labels in random order. ``privacy.png`` shows accuracy
    against the best attacker. The best of each reader is logged as ``privacy/<reader>``, labels as ``privacy/labels``.

    ``validate --run FOLDER`` attacks the checkpoint of an earlier run without training again, whether that run had this
    callback or it is given now (``--trainer.callbacks+=PrivacyAudit``). Rows have the round of the checkpoint, and lie
    in the folder of that command.

    What answers what: a sketch, a projection or quantization sends less and hides little, because the nearest public
    state still tells the token. SS-OP undone at the edge is against readers of the link, and none against the edge.
    SS-OP undone at the tail is against the edge, as far as the figures here say; many texts under one rotation give it
    away. Encryption leaves a reader of the link no state, but lengths and timing: attention masks, sizes of messages
    and the order of passes stay visible. Token pooling leaves an edge one state for many tokens, and of a text's
    length no more than the number of states. Nothing here hides labels from an edge that sees gradients.

    Where tokens are pooled (``model.token_pooling``), each token is guessed from the state that it has its part in, and
    two more attackers see all states of a text at once, ``whole text`` and ``nearest texts``. Where each token has a
    state of its own they are left out: that state tells more than the others add, and a classifier of so many numbers
    would take minutes.

    ``blind`` sees no state: it guesses the token that public texts have most often at that position, in texts of that
    length where the attention mask shows it. No defence brings the best attacker below it, and it lies well above the
    floor where texts begin or end alike, as questions do.

    An audit of 200 texts by attackers who know 2,000 takes about half a minute on one core, and more where noise or a
    reader of the link has attackers of its own.

    The attackers' public texts are the probes, or those of ``public_file``. Held-out texts are validation texts, some
    of which the attacker knows (for Procrustes); those are not scored.

    In any other Lightning project it attacks what the link callbacks at the submodule ``at`` send of its output, or the
    output itself if there are none, after each epoch. Texts are then those of ``public`` and ``private``, and the
    LightningModule needs a ``probe_step`` that runs the model on such a batch. Accuracy is the metric ``val_accuracy``
    and bytes are those of `CommunicationMonitor`, where the project has them. With several ranks the first one's model
    is attacked. Labels are not attacked there.

    Args:
        public_file: texts that the attackers know, in the form of ``data.probe_file``; the more and the more alike to
            the private ones, the better they are. None: the probes.
        num_texts: held-out texts that are attacked; all of them, if there are fewer.
        num_known: of them, known to the attacker, about.
        num_candidates: where tokens are pooled, the edge also tries texts out, with so many of the likeliest tokens at
            each place (`elsa_pl.functional.search`), which takes minutes and has not found more than the best of the
            others; 0: it does not.
        every_n_rounds: rounds between audits.
        pictures: draw into the run's folder.
        at: name of the submodule whose output [B, T, D] is sent; this and what follows are for other projects only.
        public: batches of texts that the attackers know, with ``input_ids`` and ``attention_mask`` [B, T].
        private: batches of held-out texts, likewise.
        special_ids: tokens that do not count, such as a tokenizer's ``all_special_ids``.

    Raises:
        ConfigurationError: numbers out of range; from the start of a run, no probes or validation texts, or in other
            projects no place or batches that can be audited.

    Source:
        `elsa_pl.functional.attacks`, `rotation_attacks`, `inverter` and `label_attacks` have the formulas.
    """

    def __init__(
        self,
        num_texts: int = 100,
        num_known: int = 16,
        *,
        public_file: str | None = None,
        num_candidates: int = 0,
        every_n_rounds: int = 1,
        pictures: bool = True,
        at: str | None = None,
        public: Iterable[Any] | None = None,
        private: Iterable[Any] | None = None,
        special_ids: Sequence[int] = (),
    ) -> None:
        if not 0 < 2 * num_known <= num_texts or every_n_rounds < 1 or num_candidates < 0:
            raise ConfigurationError(
                "expected 0 < num_known <= num_texts / 2, every_n_rounds >= 1 and num_candidates >= 0; got"
                f" {num_known}, {num_texts}, {every_n_rounds} and {num_candidates}"
            )
        self._num_texts, self._num_known, self._public_file = num_texts, num_known, public_file
        self._num_candidates, self._every, self._pictures = num_candidates, every_n_rounds, pictures
        self._at, self._public, self._private, self._special_ids = at, public, private, tuple(special_ids)
        self._audited = -1  # the last round
        self._rows: list[list[Any]] = []
        self._last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._audited = -1
        federated = is_federated(trainer)
        elsewhere = {"at": self._at, "public": self._public, "private": self._private, "special_ids": self._special_ids}
        here = {"public_file": self._public_file, "num_candidates": self._num_candidates}
        useless = elsewhere if federated else here
        given = [name for name, value in useless.items() if value is not None and value not in ((), 0)]
        if given:
            where = "beside links and data module" if federated else "without elsa_pl's strategy"
            raise ConfigurationError(
                f"PrivacyAudit: expected none of {', '.join(useless)} here, {where}, where they have no use; got"
                f" {' and '.join(given)}: leave it out"
            )
        if not federated:
            submodule(pl_module, self._place()[0], "PrivacyAudit")
            if not hasattr(pl_module, "probe_step"):
                raise ConfigurationError(
                    f"PrivacyAudit needs a method probe_step(batch) of the LightningModule; {type(pl_module).__name__}"
                    " has none: give it one that runs the model on a batch"
                )
        elif pl_module.task != "classification":
            raise ConfigurationError(f"PrivacyAudit works on classification; got task={pl_module.task!r}: leave it out")
        elif self._public_file is not None and not Path(self._public_file).is_file():
            raise ConfigurationError(f"PrivacyAudit: expected texts in public_file; got no file {self._public_file}")

    def check_public_texts(self, data: Any) -> None:
        """Refuse, before anything starts, public texts that attackers cannot learn from.

        Args:
            data: the data module, loaded.

        Raises:
            ConfigurationError: what is wrong with ``public_file``.
            ValueError: there are no probes.
        """
        found = public_batches(data, self._public_file)
        ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in found])
        answering(ids, data.special_ids)

    def check_links(self, links: Collection[str]) -> None:
        """Refuse, before anything starts, a model that is not cut in three.

        Args:
            links: those that all clients have.

        Raises:
            ConfigurationError: one is missing.
        """
        if "downlink" not in links:
            raise ConfigurationError(
                "PrivacyAudit attacks what an edge without labels sees; got a plan without a tail, in which it is given"
                " them, or nothing at all: leave it out"
            )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer):
            check_place(pl_module, *self._place())

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Before the checkpoint is written, which holds the rows."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":  # in other projects that would be a validation between rounds, of the same folder
            if is_federated(trainer):
                self._rows = []  # the checkpoint has those of its own run
                self._audit(trainer, pl_module, max(0, cast(Any, pl_module).num_rounds - 1))
                self._write(trainer)
        # other projects may validate several times in an epoch
        elif is_federated(trainer) or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._audit_once(trainer, pl_module)

    def _audit_once(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Add the rows of a round in training, if it is one to be audited."""
        if self._audited != trainer.current_epoch and (trainer.current_epoch + 1) % self._every == 0:
            self._audited = trainer.current_epoch
            self._audit(trainer, module, trainer.current_epoch)

    def _audit(self, trainer: "pl.Trainer", module: "pl.LightningModule", round_number: int) -> None:
        """Add the rows of a round."""
        found = self._federated(trainer, module) if is_federated(trainer) else self._alone(trainer, module)
        if found is None:
            return
        accuracy = float(trainer.callback_metrics.get("val_accuracy", nan))
        sent = _bytes(trainer, module)
        self._rows += [[round_number, *which, *figures, accuracy, sent] for which, figures in found.items()]
        self._last = {
            f"privacy/{reader}": max(share for (other, _), (share, *_) in found.items() if other == reader)
            for reader in sorted({reader for reader, _ in found})
        }

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer):
            self._audit_once(trainer, pl_module)  # no validation in this epoch
        if self._last:
            log_agreed(trainer, self._last)
        self._last = {}
        self._write(trainer)

    def _write(self, trainer: "pl.Trainer") -> None:
        if trainer.is_global_zero and self._rows:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            table = pd.DataFrame(self._rows, columns=_COLUMNS)
            table.to_csv(folder / "privacy.csv", index=False)
            if self._pictures:
                save(draw_privacy(table), folder / "privacy.png")

    def _federated(self, trainer: "pl.Trainer", module: Any) -> "_Found | None":
        """Of a client that is left, in all processes; None if its host is gone."""
        strategy: Any = trainer.strategy
        left = [name for name in strategy.rounds.topology.clients if name not in strategy.lost_clients]
        client = left[0] if left else ""
        mine = None
        if client in strategy.rounds.clients:
            try:
                with torch.inference_mode(False):
                    exposure = expose_client(trainer, module, client, self._public_file, self._num_texts)
                    mine = self._attack(exposure, int(module.num_labels))
            except RemoteError as error:
                if error.kind:
                    raise
                log.warning("no audit in this round: %s", error)
        return next((answer for answer in strategy.world.exchange(mine).values() if answer is not None), None)

    def _alone(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> "_Found | None":
        """Of the first rank's module, in all processes."""
        at, public, private = self._place()
        mine = None
        if trainer.is_global_zero:
            with torch.inference_mode(False):
                exposure = expose_module(trainer, module, at, public, private, self._num_texts, self._special_ids)
                mine = self._attack(exposure, 0)
        return agree(trainer, mine)

    def _place(self) -> tuple[str, Iterable[Any], Iterable[Any]]:
        """``at``, ``public`` and ``private``.

        Raises:
            ConfigurationError: one is missing.
        """
        given = {"at": self._at, "public": self._public, "private": self._private}
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ConfigurationError(
                "PrivacyAudit without elsa_pl's strategy: expected at (the name of a submodule), public and private"
                f" (batches); got no {' and no '.join(missing)}: give it, or use HierarchicalStrategy"
            )
        return cast(tuple[str, Iterable[Any], Iterable[Any]], tuple(given.values()))

    def _attack(self, exposure: Exposure, num_classes: int) -> "_Found":
        """Try all attackers; those of labels, if there are as many texts as classes."""
        special, pooling = exposure.special, exposure.pooling
        public = Tokens.of_batches(exposure.public, pooling)
        noised = Tokens.of_batches(exposure.noised, pooling) if exposure.noised else None
        attacker = Known(public, special, noised, exposure.subspace)
        seen = {reader: Tokens.of_batches(parts, pooling) for reader, parts in exposure.seen.items()}
        if torch.equal(seen["edge"].states, seen["link"].states):
            del seen["link"]
        plain = Tokens.of_batches(exposure.plain, pooling).states  # as anyone computes those of known texts
        found: _Found = {}
        for reader, tokens in seen.items():
            known = self._known(tokens)
            whole = None
            if pooling is not None:
                learnt_from = exposure.noised or exposure.public
                whole = whole_texts(
                    *([states for states, _ in parts] for parts in (exposure.seen[reader], learnt_from))
                )
            guesses = guess_tokens(tokens, attacker, known, plain, whole)
            if reader == "edge" and whole is not None and self._num_candidates:
                rows = candidates(tokens, attacker, guesses, whole, self._num_candidates)
                guesses["search"] = _search(exposure, tokens, attacker, known, rows)
            scored = ~known
            truth = tokens.ids[scored]
            bounds = majority_floor(truth, special, public.ids), cap(truth, public.ids, special)
            _, table = best_of_all({attack: guess[scored] for attack, guess in guesses.items()}, truth, special)
            found |= {(reader, attack): (share, *bounds) for attack, share in table.items()}
        if exposure.labels and len(labels := torch.cat(exposure.labels)) >= num_classes:
            floor, by_chance = majority_floor(labels), 0.0
            for what, parts in exposure.pooled.items():
                by: Any = "direction" if what == "gradients" else "distance"
                groups = label_clusters(torch.cat(parts), num_classes, by=by)
                found["labels", what] = matched_share(groups, labels), floor, None
                by_chance = max(by_chance, shuffled_share(groups, labels))
            found["labels", "shuffled"] = by_chance, floor, None
        return found

    def _known(self, tokens: Tokens) -> Tensor:
        """Which of the tokens belong to texts that the attacker knows: short and long ones."""
        return tokens.texts % (self._num_texts // self._num_known) == 0


def draw_privacy(table: pd.DataFrame) -> "Figure":
    """Draw accuracy against what the best attacker recovers, a dot for each round and reader; without it, the round.

    Args:
        table: that of ``privacy.csv``.

    Raises:
        ValueError: no rows.
    """
    from matplotlib.ticker import MaxNLocator

    if table.empty:
        raise ValueError("expected rows of an audit; got none: audit at least one round")
    tokens = table[table["reader"] != "labels"]
    best = tokens.groupby(["round", "reader"]).agg(
        share=("share", "max"), accuracy=("accuracy", "first"), bytes=("bytes", "first")
    )
    measured = best["accuracy"].notna().any()
    best["height"] = 100 * best["accuracy"] if measured else best.index.get_level_values("round") + 1
    figure = new_figure(6.4, 4.8)
    axes = figure.subplots()
    style(axes)
    for (reader, marker), colour in zip((("edge", "o"), ("link", "s")), ("#0072B2", "#D55E00"), strict=True):
        if reader not in best.index.get_level_values("reader"):
            continue
        points = best.xs(reader, level="reader").dropna(subset="height")
        axes.plot(100 * points["share"], points["height"], color=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(100 * points["share"], points["height"], marker=marker, color=colour, label=reader)
        for number, up in ((points.index[0], 8), (points.index[-1], -14)):
            at = points.loc[number]
            text = f"round {number + 1}" + ("" if pd.isna(at["bytes"]) else f", {at['bytes'] / 1e6:.1f} MB")
            place = (100 * at["share"], at["height"])
            # to opposite sides, as edge and link often lie close to each other
            side: Any = "left" if reader == "edge" else "right"
            offset = (6 if reader == "edge" else -6, up)
            axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8, ha=side)
    for name, label in (("floor", "commonest token"), ("cap", "cap")):
        value = 100 * float(tokens[name].iloc[-1])
        axes.axvline(value, color="#999999", linestyle=":", linewidth=1)
        foot: Any = ("data", "axes fraction")
        axes.annotate(
            label, (value, 0.02), xycoords=foot, rotation=90, fontsize=8, color="#666666", ha="right", va="bottom"
        )
    if measured:
        axes.set(xlim=(0, 100), ylim=(0, 100), ylabel="validation accuracy, %")
    else:  # the project has none
        axes.set(xlim=(0, 100), ylim=(0, best["height"].max() + 1), ylabel="round")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens recovered by the best attacker, %")
    axes.legend(title="who reads", loc="lower right", frameon=False)
    last = best.xs(best.index.get_level_values("round").max(), level="round")
    title(figure, f"The best attacker recovers {100 * last['share'].max():.0f}% of the tokens")
    return figure


def _search(exposure: Exposure, tokens: Tokens, attacker: Known, known: Tensor, candidates: Tensor) -> Tensor:
    """What an edge finds that knows the front, and tries texts out: a guess for each row of candidates [N, C].

    Special tokens and those of texts that it knows stay in place.
    """
    public = attacker.public.of(answering(attacker.public.ids, attacker.special))
    prior = prior_of(tokens, public)
    given = known | ~answering(tokens.ids, attacker.special)
    candidates = torch.where(given[:, None], tokens.ids[:, None], candidates)
    column = torch.searchsorted(prior.tokens, candidates).clamp_max(len(prior.tokens) - 1)
    likely = prior.log_shares[prior.rows[:, None], column]
    found, before = [], 0
    compute = exposure.states
    assert compute is not None
    for read, batch in exposure.seen["edge"]:
        mask = batch["attention_mask"].bool()
        own = slice(before, before + int(mask.sum()))
        before = own.stop
        tried = batch["attention_mask"].new_zeros(*mask.shape, candidates.shape[1])
        tried[mask] = candidates[own]
        log_prior = likely.new_zeros(tried.shape)
        log_prior[mask] = likely[own]
        free = torch.zeros_like(mask)
        free[mask] = ~given[own]

        def encode(ids: Tensor, mask: Tensor = batch["attention_mask"]) -> Tensor:
            return exposure.encoded(compute({"input_ids": ids, "attention_mask": mask}))

        with torch.no_grad():
            found.append(search_attack(read, encode, tried, free, log_prior=log_prior)[mask])
    return torch.cat(found)


def _bytes(trainer: "pl.Trainer", module: Any) -> float:
    """Sent so far; nan where nobody counts."""
    if is_federated(trainer):
        return int(sum(module.num_bytes.values()))
    monitor = companion(trainer, CommunicationMonitor)
    counted = None if monitor is None else monitor.num_bytes(module)
    return nan if counted is None else counted
