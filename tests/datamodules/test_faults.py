"""Faulty clients: who they are, what is wrong with them, and that everybody else is as honest as before."""

import logging
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.datamodules.faults import FaultKind, FaultSettings, corrupt, corrupt_labels
from tests.datamodules.words import first_words, make

NAMES = [f"client-{i}" for i in range(20)]


def labels_by_word(data: FederatedTextDataModule, client: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for index in range(data.client_sizes[client]):
        batch = data.train_batch(client, index)
        found.update(zip(first_words(batch), batch["labels"].tolist(), strict=True))
    return found


@pytest.mark.usefixtures("words")
def test_faults_of_labels_are_in_the_batches_of_the_faulty_clients_only(train_file: str) -> None:
    faults: dict[str, FaultKind] = {"client-0": "flipped_labels", "client-2": "shuffled_texts", "client-3": "silent"}
    data = make(train_file, faults=faults, batch_size=1, partition="iid")
    honest = make(train_file, batch_size=1, partition="iid")
    assert data.client_faults == faults
    assert honest.client_faults == {}
    for client in data.client_names:
        truth = {word: word % 3 for word in labels_by_word(honest, client)}
        assert labels_by_word(honest, client) == truth
        trained_on = labels_by_word(data, client)
        assert trained_on.keys() == truth.keys()
        assert data.label_histogram[client] == honest.label_histogram[client]
        if client == "client-0":
            assert trained_on == {word: 2 - label for word, label in truth.items()}
        elif client == "client-2":
            assert trained_on != truth
            assert sorted(trained_on.values()) == sorted(truth.values())
            assert labels_by_word(make(train_file, faults=faults, batch_size=1, partition="iid"), client) == trained_on
        else:
            assert trained_on == truth


@pytest.mark.usefixtures("words")
def test_validation_labels_are_never_faulty(train_file: str) -> None:
    data = make(train_file, faulty_fraction=0.99, fault="flipped_labels")
    assert len(data.client_faults) == 4
    for batch in data.eval_batches("validation"):
        assert batch["labels"].tolist() == [word % 3 for word in first_words(batch)]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 5), (0.02, 0), (0.125, 3), (0.99, 20)])
def test_a_fraction_draws_so_many_clients_by_the_seed(fraction: float, count: int) -> None:
    settings = FaultSettings(fraction=fraction, kind="random")
    drawn = settings.of(NAMES, 0)
    assert len(drawn) == count
    assert set(drawn) <= set(NAMES)
    assert set(drawn.values()) <= {"random"}
    assert settings.of(NAMES, 0) == drawn


def test_every_client_is_drawn_as_often_as_any_other() -> None:
    settings = FaultSettings(fraction=0.25, kind="silent")
    draws = [tuple(settings.of(NAMES, seed)) for seed in range(400)]
    counts = np.bincount([NAMES.index(name) for drawn in draws for name in drawn], minlength=20)
    assert counts.sum() == 2000
    assert 60 < counts.min() <= counts.max() < 140


@pytest.mark.usefixtures("words")
def test_a_site_knows_its_own_fault_only(train_file: str) -> None:
    common: dict[str, Any] = {"train_file": train_file, "tokenizer": "words", "labels": ["a", "b", "c"]}
    faults: dict[str, FaultKind] = {"oslo": "flipped_labels", "rome": "silent"}
    for site, expected in (("oslo", {"oslo": "flipped_labels"}), ("bern", {})):
        data = FederatedTextDataModule(**common, faults=faults)
        data.load(site)
        assert data.client_faults == expected
    data = FederatedTextDataModule(**common, faulty_fraction=0.5, fault="silent")
    with pytest.raises(ValueError, match=r"got faulty_fraction=0.5 at oslo: set data\.faults"):
        data.load("oslo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"faults": {"client-0": "lazy"}}, "kind of fault among flipped_labels, .*, slow, got lazy"),
        ({"faulty_fraction": 0.5, "fault": "lazy"}, "kind of fault among .* got lazy"),
        ({"faulty_fraction": 1.0, "fault": "slow"}, "0 <= faulty_fraction < 1, got 1.0"),
        ({"faulty_fraction": -0.1, "fault": "slow"}, "0 <= faulty_fraction < 1, got -0.1"),
        ({"faulty_fraction": float("nan"), "fault": "slow"}, "0 <= faulty_fraction < 1, got nan"),
        ({"faulty_fraction": 0.5}, r"a fault with faulty_fraction=0.5, got none: set data\.fault"),
        ({"faults": {"client-0": "slow"}, "faulty_fraction": 0.5, "fault": "slow"}, "faults or faulty_fraction, got"),
        ({"faults": {"client-0": "scaled"}, "fault_scale": 0.0}, "fault_scale > 0, got 0.0"),
        ({"faults": {"client-0": "scaled"}, "fault_scale": float("inf")}, "fault_scale > 0, got inf"),
        ({"faults": {"client-0": "flipped_labels"}, "task": "causal_lm"}, "no fault of labels with task=causal_lm"),
        ({"faulty_fraction": 0.5, "fault": "shuffled_texts", "task": "causal_lm"}, "got shuffled_texts: use a fault"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedTextDataModule(dataset="x", **settings)


def test_an_unknown_client_is_refused_when_the_clients_are_known(train_file: str) -> None:
    with pytest.raises(ValueError, match=r"among client-0, .*, client-3, got client-9: correct data\.faults"):
        make(train_file, faults={"client-0": "slow", "client-9": "slow"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "silent"}, "fault=silent has no effect without clients that have it: set data.faulty_fraction"),
        ({"scale": 2.0}, "fault_scale=2 has no effect: only sign_flip, scaled, slow use it"),
        ({"by_client": {"a": "silent"}, "scale": 2.0}, "fault_scale=2 has no effect"),
    ],
)
def test_settings_without_effect_earn_a_warning(
    settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        FaultSettings(**settings).check("classification")
    assert [record.getMessage() for record in caplog.records if message in record.getMessage()]


def test_too_small_a_fraction_earns_a_warning_and_good_settings_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FaultSettings().check("classification")
        used = FaultSettings(fraction=0.25, kind="scaled", scale=3.0)
        used.check("causal_lm")
        used.of(NAMES, 0)
    assert not caplog.records
    FaultSettings(fraction=0.1, kind="slow").of(NAMES[:4], 0)
    assert "less than half of one of 4 clients" in caplog.text


def test_slow_earns_a_warning_between_sites(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert FaultSettings(by_client={"north": "slow"}).of_site("south") == {}
        assert not caplog.records
        assert FaultSettings(by_client={"north": "slow"}).of_site("north") == {"north": "slow"}
    assert "fault=slow has no effect at north: between sites time is real" in caplog.text


def test_labels_are_flipped_shuffled_or_left() -> None:
    codes = np.array([0, 1, 2, 3, 4, 4])
    generator = np.random.default_rng(0)
    assert corrupt_labels("flipped_labels", codes, 5, generator).tolist() == [4, 3, 2, 1, 0, 0]
    shuffled = corrupt_labels("shuffled_texts", codes, 5, generator)
    assert sorted(shuffled) == sorted(codes)
    assert shuffled.tolist() != codes.tolist()
    assert codes.tolist() == [0, 1, 2, 3, 4, 4]
    for kind in set(get_args(FaultKind)) - {"flipped_labels", "shuffled_texts"}:
        assert corrupt_labels(kind, codes, 5, generator).tolist() == codes.tolist()


def adapters(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b": (4, 8), "a": (8, 4), "scale": (), "empty": (0, 3)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_updates_are_flipped_and_scaled_around_what_was_received(dtype: torch.dtype) -> None:
    submitted, received = adapters(1, dtype), adapters(2, dtype)
    for kind, factor in (("sign_flip", -3.0), ("scaled", 3.0)):
        corrupted = corrupt(kind, submitted, received, 3.0, draw())  # type: ignore[arg-type]  # a literal in a loop
        assert corrupted is not None
        assert list(corrupted) == list(submitted)
        for name, tensor in corrupted.items():
            assert (tensor.dtype, tensor.shape) == (dtype, submitted[name].shape)
            expected = received[name].double() + factor * (submitted[name].double() - received[name].double())
            torch.testing.assert_close(tensor.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


def tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype == torch.bfloat16 else 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_updates_have_the_norm_of_the_honest_ones_and_nothing_else_of_them(dtype: torch.dtype) -> None:
    received = {"a": torch.zeros(64, 32, dtype=dtype), "still": torch.ones(5, dtype=dtype)}
    submitted = {"a": adapters(1)["a"].new_full((64, 32), 0.01).to(dtype), "still": received["still"].clone()}
    corrupted = corrupt("random", submitted, received, 5.0, draw())
    assert corrupted is not None
    assert corrupted["a"].norm().item() == pytest.approx(submitted["a"].norm().item(), rel=0.01)
    assert abs(torch.cosine_similarity(corrupted["a"].float().ravel(), submitted["a"].float().ravel(), 0)) < 0.1
    assert torch.equal(corrupted["still"], received["still"])
    again, other = (corrupt("random", submitted, received, 5.0, draw(seed)) for seed in (0, 1))
    assert again is not None
    assert other is not None
    assert torch.equal(corrupted["a"], again["a"])
    assert not torch.equal(corrupted["a"], other["a"])


def test_noise_does_not_depend_on_the_order_of_the_layers() -> None:
    submitted, received = adapters(1), adapters(2)
    turned = dict(reversed(submitted.items()))
    one, other = (corrupt("random", mapping, received, 5.0, draw()) for mapping in (submitted, turned))
    assert one is not None
    assert other is not None
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_kinds_submit_what_they_have_and_the_silent_nothing() -> None:
    submitted, received = adapters(1), adapters(2)
    assert corrupt("silent", submitted, received, 5.0, draw()) is None
    for kind in ("slow", "flipped_labels", "shuffled_texts"):
        kept = corrupt(kind, submitted, received, 5.0, draw())
        assert kept is not None
        assert kept is not submitted
        assert all(kept[name] is submitted[name] for name in submitted)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a difference in \['b'\]: pass the adapters"):
        corrupt("scaled", {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}, 5.0, draw())
    with pytest.raises(ValueError, match=r"the shape \(2,\) for a, got \(3,\)"):
        corrupt("sign_flip", {"a": torch.ones(2)}, {"a": torch.ones(3)}, 5.0, draw())
