"""How much of the texts a run gives away: the attacks of `elsa_pl.functional` on what links really carry.

Two readers are told apart. The *edge* decodes the uplink, with the secret where SS-OP is undone there. The *link* reads
what passes and decodes it with all that is public, so without the secret. Without a secret at the edge the two see the
same.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.callbacks.attackers import Tokens, candidates, guess_tokens
from elsa_pl.callbacks.drawing import new_figure, save, style, title
from elsa_pl.callbacks.probing import is_federated, log_agreed
from elsa_pl.errors import ConfigurationError, RemoteError
from elsa_pl.functional.label_attacks import label_clusters, matched_share, pool
from elsa_pl.functional.recovery import best_of_all, cap, majority_floor
from elsa_pl.functional.search import search_attack
from elsa_pl.links import NOBODY, crossing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_LARGEST = 1e4  # no state is so large
_COLUMNS = ["round", "reader", "what", "share", "floor", "cap", "accuracy", "bytes"]


class PrivacyAudit(Callback):
    """Attacks the uplink of one client on held-out texts after a round, and reports the best attacker.

    ``privacy.csv`` has, by round and reader, the share of tokens that each attack recovers (special tokens do not
    count), next to the floor (guessing the commonest), the cap (tokens that occur in public text at all), accuracy and
    bytes so far; and the share of labels that clusters of what the edge sees agree with. ``privacy.png`` shows accuracy
    against the best attacker. The best of each reader is logged as ``privacy/<reader>``, labels as
    ``privacy/labels``.

    What answers what: a sketch, a projection or quantization sends less and hides little, because the nearest public
    state still tells the token. SS-OP undone at the edge is against readers of the link, and none against the edge.
    SS-OP undone at the tail is against the edge, as far as the figures here say; many texts under one rotation give it
    away. Encryption leaves a reader of the link nothing. Token pooling leaves an edge one state for many tokens.
    Nothing here hides labels from an edge that sees gradients.

    Where tokens are pooled (``model.token_pooling``), each token is guessed from the state that it has its part in.
    ``blind`` sees nothing: it guesses the token that public texts have most often at that position. No defence brings
    the best attacker below it, and it lies well above the floor where texts begin alike, as questions do.

    The attackers' public texts are the probes. Held-out texts are validation texts, some of which the attacker knows
    (for Procrustes); those are not scored.

    Args:
        public_file: texts that the attackers know, in the form of ``data.probe_file``; the more and the more alike to
            the private ones, the better they are. None: the probes.
        num_texts: held-out texts that are attacked, about.
        num_known: of them, known to the attacker, about.
        num_candidates: where tokens are pooled, the edge also tries texts out, with so many of the likeliest tokens at
            each place (`elsa_pl.functional.search`), which takes minutes; 0: it does not.
        every_n_rounds: rounds between audits.
        pictures: draw into the run's folder.

    Raises:
        ConfigurationError: numbers out of range; from the start of a run, no `elsa_pl` strategy, probes or validation
            texts.

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
    ) -> None:
        if not 0 < 2 * num_known <= num_texts or every_n_rounds < 1 or num_candidates < 0:
            raise ConfigurationError(
                "expected 0 < num_known <= num_texts / 2, every_n_rounds >= 1 and num_candidates >= 0; got"
                f" {num_known}, {num_texts}, {every_n_rounds} and {num_candidates}"
            )
        self._num_texts, self._num_known, self._public_file = num_texts, num_known, public_file
        self._num_candidates, self._every, self._pictures = num_candidates, every_n_rounds, pictures
        self._rows: list[list[Any]] = []
        self._last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if not is_federated(trainer):
            raise ConfigurationError("PrivacyAudit attacks the links of elsa_pl: it needs HierarchicalStrategy")
        if pl_module.task != "classification":
            raise ConfigurationError(f"PrivacyAudit works on classification; got task={pl_module.task!r}: leave it out")
        if self._public_file is not None and not Path(self._public_file).is_file():
            raise ConfigurationError(f"PrivacyAudit: expected texts in public_file; got no file {self._public_file}")

    def check_probes(self, num_probes: int, num_classes: int) -> None:
        """Probes are asked for before anything starts; any number will do."""

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Before the checkpoint is written, which holds the rows."""
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self._every:
            return
        strategy: Any = trainer.strategy
        left = [name for name in strategy.rounds.topology.clients if name not in strategy.lost_clients]
        client = left[0] if left else ""
        mine = None
        if client in strategy.rounds.clients:
            try:
                with torch.inference_mode(False):
                    mine = self._audit(trainer, pl_module, client)
            except RemoteError as error:
                if error.kind:
                    raise
                log.warning("no audit in this round: %s", error)
        found = [answer for answer in strategy.world.exchange(mine).values() if answer is not None]
        if not found:  # the client's host is gone
            return
        shares, floor, most = found[0]
        module: Any = pl_module
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        total = sum(module.num_bytes.values())
        for (reader, what), share in shares.items():
            bounds = [floor, most] if reader != "labels" else [None, None]
            self._rows.append([trainer.current_epoch, reader, what, share, *bounds, accuracy, total])
        readers = {reader for reader, _ in shares}
        self._last = {
            f"privacy/{reader}": max(share for (other, _), share in shares.items() if other == reader)
            for reader in sorted(readers)
        }

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._last:
            log_agreed(trainer, self._last)
        self._last = {}
        if trainer.is_global_zero and self._rows:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            table = pd.DataFrame(self._rows, columns=_COLUMNS)
            table.to_csv(folder / "privacy.csv", index=False)
            if self._pictures:
                save(draw_privacy(table), folder / "privacy.png")

    def _audit(
        self, trainer: "pl.Trainer", module: Any, name: str
    ) -> tuple[dict[tuple[str, str], float], float, float]:
        """Shares by reader and attack, the floor and the cap."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        strategy: Any = trainer.strategy
        client, plan = strategy.rounds.clients[name], strategy.placement.plans[name]
        special = data.special_ids
        batches = _some(data.eval_batches("validation"), self._num_texts)
        own, nobody = (module.known_codecs(plan, who).get("uplink") for who in (name, NOBODY))

        public_parts, plain_parts, seen_parts = [], [], {"edge": [], "link": []}  # type: ignore[var-annotated]
        for batch in data.probe_batches() if self._public_file is None else data.text_batches(self._public_file):
            states = client.states(batch)
            with torch.no_grad():
                public_parts.append((states if nobody is None else nobody(states), batch))
        pooled: dict[str, list[Tensor]] = {"uplink": [], "middle": [], "gradients": []}
        for number, batch in enumerate(batches):
            exposed = client.expose(batch, (trainer.current_epoch, number))
            with torch.no_grad(), crossing(exposed.number):
                for reader, codec in (("edge", own), ("link", nobody)):
                    read = exposed.sent if codec is None else codec.side("decoder")(exposed.sent)
                    read = read.nan_to_num(0, 0, 0).clamp(-_LARGEST, _LARGEST)  # whoever has no key reads anything
                    seen_parts[reader].append((read, batch))
            plain_parts.append((exposed.states, batch))
            pooled["uplink"].append(pool(seen_parts["edge"][-1][0], exposed.mask))
            pooled["middle"].append(pool(exposed.outputs, exposed.mask_down))
            pooled["gradients"].append(pool(exposed.gradients, exposed.mask_down))

        pooling = module.token_pooling.uplink
        public = Tokens.of_batches(public_parts, pooling)
        seen = {reader: Tokens.of_batches(parts, pooling) for reader, parts in seen_parts.items()}
        if torch.equal(seen["edge"].states, seen["link"].states):
            seen = {"edge": seen["edge"]}
        subspace = None if nobody is None else nobody.subspace
        plain = Tokens.of_batches(plain_parts, pooling).states  # as anyone computes those of known texts
        shares: dict[tuple[str, str], float] = {}
        for reader, tokens in seen.items():
            known = self._known(tokens)
            guesses = guess_tokens(tokens, public, known, plain, subspace, special)
            if reader == "edge" and pooling is not None and self._num_candidates:
                rows = candidates(tokens, public, guesses, self._num_candidates)
                guesses["search"] = _search(client, nobody, seen_parts[reader], rows)
            scored = ~known
            _, table = best_of_all(
                {attack: guess[scored] for attack, guess in guesses.items()}, tokens.ids[scored], special
            )
            shares |= {(reader, attack): share for attack, share in table.items()}
        labels = torch.cat([batch["labels"] for batch in batches])
        num_classes = int(module.num_labels)
        if len(labels) >= num_classes:
            for what, parts in pooled.items():
                by: Any = "direction" if what == "gradients" else "distance"
                groups = label_clusters(torch.cat(parts), num_classes, by=by)
                shares["labels", what] = matched_share(groups, labels)
        scored_ids = seen["edge"].ids[~self._known(seen["edge"])]
        return shares, majority_floor(scored_ids, special, public.ids), cap(scored_ids, public.ids, special)

    def _known(self, tokens: Tokens) -> Tensor:
        """Which of the tokens belong to texts that the attacker knows: short and long ones."""
        return tokens.texts % (self._num_texts // self._num_known) == 0


def draw_privacy(table: pd.DataFrame) -> "Figure":
    """Draw accuracy against what the best attacker recovers, a dot for each round and reader.

    Args:
        table: that of ``privacy.csv``.

    Raises:
        ValueError: no rows.
    """
    if table.empty:
        raise ValueError("expected rows of an audit; got none: audit at least one round")
    tokens = table[table["reader"] != "labels"]
    best = tokens.groupby(["round", "reader"]).agg(
        share=("share", "max"), accuracy=("accuracy", "first"), bytes=("bytes", "first")
    )
    figure = new_figure(6.4, 4.8)
    axes = figure.subplots()
    style(axes)
    for (reader, marker), colour in zip((("edge", "o"), ("link", "s")), ("#0072B2", "#D55E00"), strict=True):
        if reader not in best.index.get_level_values("reader"):
            continue
        points = best.xs(reader, level="reader")
        axes.plot(100 * points["share"], 100 * points["accuracy"], color=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(100 * points["share"], 100 * points["accuracy"], marker=marker, color=colour, label=reader)
        for number, up in ((points.index[0], 8), (points.index[-1], -14)):
            at = points.loc[number]
            text = f"round {number + 1}, {at['bytes'] / 1e6:.1f} MB"
            place = (100 * at["share"], 100 * at["accuracy"])
            # to opposite sides, as edge and link often lie close to each other
            side: Any = "left" if reader == "edge" else "right"
            offset = (6 if reader == "edge" else -6, up)
            axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8, ha=side)
    for name, label in (("floor", "commonest token"), ("cap", "cap")):
        value = 100 * float(tokens[name].iloc[-1])
        axes.axvline(value, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(label, (value, 2), rotation=90, fontsize=8, color="#666666", ha="right", va="bottom")
    axes.set(xlim=(0, 100), ylim=(0, 100), ylabel="validation accuracy, %")
    axes.set_xlabel("tokens recovered by the best attacker, %")
    axes.legend(title="who reads", loc="lower right", frameon=False)
    last = best.xs(best.index.get_level_values("round").max(), level="round")
    title(figure, f"The best attacker recovers {100 * last['share'].max():.0f}% of the tokens")
    return figure


def _search(client: Any, codec: Any, parts: list[tuple[Tensor, Mapping[str, Tensor]]], candidates: Tensor) -> Tensor:
    """What an edge finds that knows the front, and tries texts out: a guess for each row of candidates [N, C]."""
    found, before = [], 0
    for read, batch in parts:
        mask = batch["attention_mask"].bool()
        tried = batch["attention_mask"].new_zeros(*mask.shape, candidates.shape[1])
        tried[mask] = candidates[before : before + int(mask.sum())]
        before += int(mask.sum())

        def encode(ids: Tensor, batch: Mapping[str, Tensor] = batch) -> Tensor:
            states = client.states({"input_ids": ids, "attention_mask": batch["attention_mask"]})
            encoded: Tensor = states if codec is None else codec(states)
            return encoded

        with torch.no_grad():
            found.append(search_attack(read, encode, tried, mask)[mask])
    return torch.cat(found)


def _some(batches: list[Mapping[str, Tensor]], num_texts: int) -> list[Mapping[str, Tensor]]:
    """About so many texts, short and long: batches come in order of length.

    Raises:
        ConfigurationError: there are none.
    """
    stride = max(1, sum(len(batch["input_ids"]) for batch in batches) // num_texts)
    if not batches:
        raise ConfigurationError("PrivacyAudit needs validation texts: set data.validation_fraction or validation_file")
    # copies, since what was made under inference mode has no gradients
    return [{name: value[::stride].clone() for name, value in batch.items()} for batch in batches]
