"""`PrivacyAudit` in a Lightning project that has nothing else of elsa_pl: it attacks the output of a submodule."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from elsa_pl.callbacks import SSOP, CommunicationMonitor, LinkProjection, LinkQuantization, PrivacyAudit
from elsa_pl.callbacks.exposure import Exposure, expose_module
from elsa_pl.callbacks.privacy import draw_privacy
from elsa_pl.callbacks.probing import evaluating, probe
from elsa_pl.errors import ConfigurationError
from tests.runs import assert_equal

WIDTH, VOCABULARY, CLS, SEP = 32, 60, 1, 2
AT = "bert.encoder.layer.0"
Batch = dict[str, Tensor]


class Classifier(pl.LightningModule):
    """A random BERT of two blocks and a head, which a front of one block would be cut from."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(WIDTH, 2)
        self.num_probed = 0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
        return logits

    def probe_step(self, batch: Batch) -> Tensor:
        self.num_probed += 1
        return self.forward(batch["input_ids"], batch["attention_mask"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0], batch[1]).argmax(1) == batch[2]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def texts(count: int, seed: int) -> Batch:
    """Random words between [CLS] and [SEP], 4 to 10 of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 12), generator=generator)
    ends = torch.randint(5, 12, (count, 1), generator=generator)
    places = torch.arange(12)
    ids = ids.masked_fill(places == 0, CLS).masked_fill(places == ends, SEP).masked_fill(places > ends, 0)
    return {"input_ids": ids, "attention_mask": (places <= ends).long()}


def batches(count: int, seed: int) -> list[Batch]:
    whole = texts(count, seed)
    return [
        {name: value[start : start + 16] for name, value in whole.items()}
        for start in range(0, len(whole["input_ids"]), 16)
    ]


def audit(**changed: Any) -> PrivacyAudit:
    given = {"at": AT, "public": batches(160, 1), "private": batches(48, 2), "special_ids": (0, CLS, SEP)}
    return PrivacyAudit(num_texts=24, num_known=6, **{**given, **changed})


def fit(
    folder: Path,
    *callbacks: pl.Callback,
    make: Callable[[], Classifier] = Classifier,
    validate: bool = True,
    **settings: Any,
) -> tuple[Classifier, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    known = texts(64, 0)
    labels = (known["input_ids"][:, 1] > VOCABULARY // 2).long()
    data = TensorDataset(known["input_ids"], known["attention_mask"], labels)
    module = make()
    trainer = pl.Trainer(
        **{"max_epochs": 1, **settings},
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, 32) if validate else None)
    return module, trainer


def shares(folder: Path) -> "pd.Series[float]":
    """Of the last round."""
    table = pd.read_csv(folder / "privacy.csv")
    last: pd.Series[float] = table[table["round"] == table["round"].max()].set_index(["reader", "what"])["share"]
    return last


def test_a_plain_link_is_read(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, audit())
    table = pd.read_csv(tmp_path / "privacy.csv")
    assert list(table.columns) == ["round", "reader", "what", "share", "floor", "cap", "accuracy", "bytes"]
    assert set(table["reader"]) == {"edge"}, "with nothing to decode, all readers see the same"
    assert table["share"].max() > 0.95
    assert (table["share"] <= table["cap"]).all()
    assert table["floor"].max() < 0.1
    assert float(trainer.callback_metrics["privacy/edge"]) == pytest.approx(table["share"].max())
    assert table["accuracy"].to_numpy() == pytest.approx(float(trainer.callback_metrics["val_accuracy"]))
    assert table["bytes"].isna().all(), "nobody counts"
    assert (tmp_path / "privacy.png").stat().st_size > 10_000


def test_states_in_a_model_output_are_read(tmp_path: Path) -> None:
    fit(tmp_path, LinkQuantization(8, at="bert.encoder", probes=batches(160, 1)), audit(at="bert.encoder"))
    assert shares(tmp_path)["edge", "nearest"] > 0


def test_special_tokens_do_not_count(tmp_path: Path) -> None:
    fit(tmp_path, audit())
    without = shares(tmp_path)["edge", "blind"]
    fit(tmp_path, audit(special_ids=()))
    assert shares(tmp_path)["edge", "blind"] > without + 0.05, "[CLS] is easily guessed"


def test_a_secret_that_the_edge_has_keeps_out_a_reader_of_the_link(tmp_path: Path) -> None:
    turning = SSOP(WIDTH - 1, undo="edge", at=AT, probes=batches(160, 1))
    _, trainer = fit(tmp_path, turning, LinkQuantization(8, at=AT), CommunicationMonitor(), audit())
    found = shares(tmp_path)
    assert found["edge"].max() > 0.95
    assert found["link", "nearest"] < 0.5 * found["edge", "nearest"]
    for reader in ("edge", "link"):
        assert float(trainer.callback_metrics[f"privacy/{reader}"]) == pytest.approx(found[reader].max())
    sent = pd.read_csv(tmp_path / "traffic.csv")["payload_bytes"].sum()
    assert set(pd.read_csv(tmp_path / "privacy.csv")["bytes"]) == {sent}


def test_a_secret_of_the_tail_keeps_out_the_edge(tmp_path: Path) -> None:
    """All directions turned in which states differ: whoever knows no text finds little; known texts give it away."""
    fit(tmp_path, SSOP(WIDTH - 1, at=AT, decode_at="bert.encoder.layer.1", probes=batches(160, 1)), audit())
    found = shares(tmp_path)
    assert set(found.index.get_level_values("reader")) == {"edge"}, "the link says no more than the edge can decode"
    assert found["edge", "nearest"] < 0.3
    assert found["edge", "complement"] < 0.3
    assert found["edge", "procrustes"] > 0.6


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_bytes_do_not_depend_on_the_order_of_callbacks(tmp_path: Path, order: slice) -> None:
    stack = [CommunicationMonitor(), audit()][order]
    fit(tmp_path, LinkProjection(4, at=AT, probes=batches(160, 1)), *stack, validate=False)
    sent = pd.read_csv(tmp_path / "traffic.csv")["payload_bytes"].sum()
    assert set(pd.read_csv(tmp_path / "privacy.csv")["bytes"]) == {sent}


def test_it_changes_nothing(tmp_path: Path) -> None:
    """Neither numbers nor modes, even of parts that a project keeps in evaluation, nor what is counted."""

    def make() -> Classifier:
        module = Classifier()
        module.unused.eval()
        return module

    def stack() -> list[pl.Callback]:
        return [LinkProjection(4, at=AT, probes=batches(160, 1)), CommunicationMonitor()]

    without, _ = fit(tmp_path / "without", *stack(), make=make, max_epochs=2)
    shuffled = DataLoader(
        TensorDataset(torch.arange(48)), batch_size=16, shuffle=True, collate_fn=lambda _: texts(16, 2)
    )
    audited, _ = fit(tmp_path / "audited", *stack(), audit(private=shuffled), make=make, max_epochs=2)
    assert audited.num_probed > without.num_probed
    assert_equal(dict(audited.named_parameters()), dict(without.named_parameters()))
    assert [part.training for part in audited.modules()] == [part.training for part in without.modules()]
    counted = [pd.read_csv(tmp_path / name / "traffic.csv") for name in ("without", "audited")]
    pd.testing.assert_frame_equal(*counted)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"max_epochs": 2, "validate": False}, {0, 1}),
        ({"max_epochs": 2, "val_check_interval": 0.5}, {0, 1}),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, {0, 1, 2}),
    ],
)
def test_each_epoch_is_audited_once(tmp_path: Path, settings: dict[str, Any], rounds: set[int]) -> None:
    """However often a project validates."""
    fit(tmp_path, audit(pictures=False), **settings)
    table = pd.read_csv(tmp_path / "privacy.csv")
    assert set(table["round"]) == rounds
    assert not table.duplicated(["round", "reader", "what"]).any()
    if settings.get("validate") is False:
        assert table["accuracy"].isna().all()


def test_a_picture_needs_no_accuracy(tmp_path: Path) -> None:
    fit(tmp_path, audit(), validate=False, max_epochs=2)
    assert (tmp_path / "privacy.png").stat().st_size > 10_000
    (axes,) = draw_privacy(pd.read_csv(tmp_path / "privacy.csv")).axes
    assert axes.get_ylabel() == "round"
    assert [text.get_text() for text in axes.texts[:2]] == ["round 1", "round 2"]


@pytest.mark.parametrize("undo", ["edge", "tail"])
def test_the_edge_sees_what_the_model_goes_on_with(tmp_path: Path, undo: Any) -> None:
    back: dict[str, Any] = {"decode_at": "bert.encoder.layer.1"} if undo == "tail" else {}
    stack = [SSOP(16, undo, at=AT, probes=batches(160, 1), **back), LinkQuantization(4, at=AT)]
    private = batches(16, 2)
    went_on: list[Tensor] = []
    exposures: list[Exposure] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
            exposures.append(expose_module(trainer, pl_module, AT, batches(16, 1), private, 16, ()))
            place = pl_module.get_submodule("bert.encoder.layer.1")
            handle = place.register_forward_pre_hook(lambda _, args: went_on.append(args[0].detach().clone()))
            with evaluating(pl_module):
                probe(pl_module, private[0])
            handle.remove()

    fit(tmp_path, *stack, Look())
    ((seen, batch),) = exposures[0].seen["edge"]
    assert torch.equal(batch["input_ids"], private[0]["input_ids"])
    torch.testing.assert_close(seen, went_on[0])


def test_attackers_have_no_secret_of_earlier_stages(tmp_path: Path) -> None:
    """Behind a stage that turns, private states are turned, and those of public texts are as anyone computes them."""
    found = []
    for seed in (0, 1):
        turning = SSOP(WIDTH - 1, at=AT, decode_at="bert.encoder.layer.1", seed=seed, probes=batches(160, 1))

        class Look(pl.Callback):
            def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
                found.append(
                    expose_module(trainer, pl_module, "bert.encoder.layer.1", batches(16, 1), batches(16, 2), 16, ())
                )

        fit(tmp_path, turning, Look())
    one, other = found
    torch.testing.assert_close(one.public[0][0], other.public[0][0])
    assert (one.plain[0][0] - other.plain[0][0]).norm() > 0.1 * one.plain[0][0].norm()


def test_a_codec_of_an_earlier_fit_sends_nothing(tmp_path: Path) -> None:
    kept = Classifier()
    fit(tmp_path, LinkProjection(16, learn=False, at=AT, probes=batches(160, 1)), make=lambda: kept)
    fit(tmp_path, CommunicationMonitor(), audit(), make=lambda: kept)
    assert shares(tmp_path)["edge"].max() > 0.9, "two numbers of a state would not tell that much"


def test_no_hook_is_left(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, audit())
    assert not module.bert.encoder.layer[0]._forward_hooks
    module, _ = fit(tmp_path, SSOP(8, undo="edge", at=AT, probes=batches(160, 1)), audit())
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("number", [1, 3, 13])
def test_no_hook_is_left_by_an_audit_that_failed(tmp_path: Path, number: int) -> None:
    """In the check before training, or among public or private batches."""

    class Failing(Classifier):
        def probe_step(self, batch: Batch) -> Tensor:
            logits = super().probe_step(batch)
            if self.num_probed == number + 10:  # the projection has had its own
                raise RuntimeError("as asked")
            return logits

    failing = Failing()
    with pytest.raises(RuntimeError, match="as asked"):
        fit(tmp_path, LinkProjection(4, at=AT, probes=batches(160, 1)), audit(), make=lambda: failing, validate=False)
    assert not any(part._forward_hooks for part in failing.modules())
    assert failing.head.training


# ---- what cannot be audited ------------------------------------------------------------------------------------------


def without(name: str) -> list[Batch]:
    return [{other: value for other, value in batch.items() if other != name} for batch in batches(16, 1)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"at": "bert.encoder.layer.7"},
            r"a submodule of Untrained; got 'bert\.encoder\.layer\.7'.* such as bert\.enc",
        ),
        ({"at": None}, r"expected at .*, public and private .*; got no at: give it"),
        ({"public": None, "private": None}, "got no public and no private: give it"),
        ({"public_file": "texts.csv"}, "expected none of public_file, num_candidates here, .*; got public_file"),
        ({"num_candidates": 4}, "got num_candidates: leave it out"),
        (
            {"at": "head"},
            r"expected hidden states \[B, T, D\] from head, here \[16, 12, 'D'\]; got torch.float32 \[16, 2\]",
        ),
        ({"at": "unused"}, "expected that probe_step runs unused once for a batch; it did so 0 times"),
        ({"public": []}, "expected batches in public; got none: give a list of batches or a DataLoader"),
        ({"private": []}, "expected batches in private; got none"),
        ({"public": without("input_ids")}, r"public batches .*; got a dict of \['attention_mask'\], without input_ids"),
        ({"private": without("attention_mask")}, "private batches .*, without attention_mask: give batches as a tok"),
        ({"private": [torch.zeros(2, 3)]}, "got a Tensor, without input_ids and attention_mask"),
        ({"private": [{name: value.float() for name, value in texts(4, 1).items()}]}, r"input_ids of whole numbers"),
        (
            {"private": [{**texts(4, 1), "attention_mask": torch.ones(4, 3)}]},
            r"got torch.int64 \[4, 12\] and .* \[4, 3\]",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused_before_training(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    class Untrained(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            pytest.fail("it has begun to train")

    untrained = Untrained()
    with pytest.raises(ConfigurationError) as raised:
        fit(tmp_path, audit(**changed), make=lambda: untrained)
    assert re.search(message, str(raised.value)), raised.value
    assert not any(part._forward_hooks for part in untrained.modules())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"private": [texts(1, 2)]}, "expected at least 2 private texts, of which attackers know one; got 1"),
        ({"special_ids": range(VOCABULARY)}, "expected tokens besides special_ids in public; got"),
        (
            {"public": iter(batches(32, 1)), "every_n_rounds": 1},
            "got none: give a list of batches or a DataLoader, and no",
        ),
    ],
)
def test_too_little_to_audit(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, audit(**changed), max_epochs=2)


def test_a_project_without_probe_step_is_told_so(tmp_path: Path) -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(1, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"needs a method probe_step\(batch\) .*; Bare has none"):
        fit(tmp_path, audit(at="front"), make=Bare)  # type: ignore[arg-type]


@pytest.mark.parametrize("places", [{"at": "no"}, {"at": AT, "decode_at": "no"}])
def test_stages_say_which_submodule_is_missing(tmp_path: Path, places: dict[str, str]) -> None:
    turning = SSOP(8, "tail" if "decode_at" in places else "edge", probes=batches(160, 1), **places)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="SSOP: expected a submodule of Classifier; got 'no'"):
        fit(tmp_path, turning)


def counted(folder: Path, phase: str = "training") -> dict[tuple[str, str], int]:
    """Messages, by place and direction."""
    table = pd.read_csv(folder / "traffic.csv").query("phase == @phase")
    return {(name, way): int(count) for name, way, count in table[["client", "direction", "messages"]].to_numpy()}


def test_calibration_is_no_traffic(tmp_path: Path) -> None:
    """The second place is calibrated by passes through the first; four batches are four messages at each."""
    places = [AT, "bert.encoder.layer.1"]
    stages = [LinkQuantization(8, at=place, probes=batches(160, 1)) for place in places]
    fit(tmp_path, *stages, CommunicationMonitor(), validate=False)
    assert counted(tmp_path) == {(place, way): 4 for place in places for way in ("forward", "backward")}


@pytest.mark.parametrize("monitored", [True, False])
def test_passes_between_two_fits_belong_to_neither(tmp_path: Path, monitored: bool) -> None:
    """Those of a test, whether or not a monitor was there."""

    class Tested(Classifier):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(batch[0], batch[1])

    kept = Tested()
    stage = LinkQuantization(8, at=AT, probes=batches(160, 1))
    monitor = [CommunicationMonitor()] if monitored else []
    _, trainer = fit(tmp_path, stage, *monitor, make=lambda: kept)
    known = texts(64, 3)
    data = DataLoader(TensorDataset(known["input_ids"], known["attention_mask"], torch.zeros(64)), batch_size=16)
    trainer.test(kept, data, verbose=False)
    fit(tmp_path / "again", stage, CommunicationMonitor(), make=lambda: kept, validate=False)
    assert counted(tmp_path / "again") == {(AT, "forward"): 4, (AT, "backward"): 4}


def test_small_batches_give_as_many_texts(tmp_path: Path) -> None:
    """Of 48 texts in batches of two, 24 are asked for."""
    whole = texts(48, 2)
    pairs = [{name: value[start : start + 2] for name, value in whole.items()} for start in range(0, 48, 2)]
    found: list[Exposure] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
            found.append(expose_module(trainer, pl_module, AT, batches(16, 1), pairs, 24, ()))
            found.append(expose_module(trainer, pl_module, AT, batches(16, 1), pairs, 5, ()))

    fit(tmp_path, Look())
    assert [sum(len(states) for states, _ in exposure.plain) for exposure in found] == [24, 5]


def test_another_validation_changes_no_rows(tmp_path: Path) -> None:
    """Of a project that validates by itself, after or between fits."""
    _, trainer = fit(tmp_path, audit(pictures=False), max_epochs=2)
    before = (tmp_path / "privacy.csv").read_text()
    known = texts(32, 3)
    data = TensorDataset(known["input_ids"], known["attention_mask"], torch.zeros(32))
    trainer.validate(trainer.lightning_module, DataLoader(data, batch_size=16), verbose=False)
    assert (tmp_path / "privacy.csv").read_text() == before
