"""A run that was interrupted and goes on from its checkpoint ends where it would have ended."""

from pathlib import Path

import pytest

from tests.runs import Run, Settings, assert_equal, moved, run_forked, run_here, write_data

SETTINGS = {
    "strategy.num_edges": 2,
    "strategy.edge_rounds": 2,
    "strategy.participation": 0.5,
    "strategy.adapter_bits": 4,
    "model.lora": {"dropout": 0.2},
    "model.accumulate_grad_batches": 2,
    "data.batch_size": 4,
    "trainer.max_epochs": 4,
    "checkpoint.save_top_k": -1,
}
SCHEDULE = {"model.lr_schedule": "linear", "model.warmup_fraction": 0.4}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return {**SETTINGS, **SCHEDULE, **write_data(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Run:
    return run_here(tmp_path_factory.mktemp("whole"), "run", settings)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, settings: Settings, whole: Run) -> Run:
    """Rounds 3 and 4 again, by a new run from the checkpoint of round 2."""
    folder = tmp_path_factory.mktemp("resumed")
    return run_here(folder, "run", {**settings, "ckpt_path": str(whole.checkpoint(1))})


def test_resumed_equals_uninterrupted(whole: Run, resumed: Run) -> None:
    """The warm-up is under way at the checkpoint, so a schedule that starts again would show."""
    for epoch in (2, 3):
        assert_equal(resumed.adapters(epoch), whole.adapters(epoch))
    assert_equal(resumed.adapters(), whole.adapters())
    assert moved(whole.adapters(3), whole.adapters(1))
    assert sorted(resumed.metrics()) == [2, 3, 4], "rounds 1 and 2 were not run again"


def test_resumed_logs_what_was_logged(whole: Run, resumed: Run) -> None:
    for epoch in (2, 3):
        got, expected = resumed.metrics()[epoch], whole.metrics()[epoch]
        names = ["train_loss", "val_loss", "val_accuracy", "val_f1"]
        assert {name: got[name] for name in names} == {name: expected[name] for name in names}


def test_resumed_has_the_totals_of_the_whole(whole: Run, resumed: Run) -> None:
    got, expected = resumed.summary(), whole.summary()
    assert got["rounds"] == expected["rounds"] == 4
    assert got["bytes"] == expected["bytes"]


def test_more_rounds_than_first_asked_for(tmp_path: Path, settings: Settings) -> None:
    """A finished run goes on; its schedule is constant, since another one depends on the number of rounds."""
    settings = {**settings, "model.lr_schedule": "constant", "model.warmup_fraction": 0.0}
    four = run_here(tmp_path, "four", settings)
    two = run_here(tmp_path, "two", {**settings, "trainer.max_epochs": 2})
    assert_equal(two.adapters(), four.adapters(1))
    more = run_here(tmp_path, "more", {**settings, "ckpt_path": str(two.checkpoint())})
    assert_equal(more.adapters(), four.adapters())
    assert more.summary()["rounds"] == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resumed_in_another_layout(tmp_path: Path, settings: Settings, whole: Run) -> None:
    """Only the cloud reads the checkpoint."""
    settings = {**settings, "strategy.layout": "tiers", "ckpt_path": str(whole.checkpoint(1))}
    run = run_forked(tmp_path / "runs", "run", settings, num_processes=2)
    assert_equal(run.adapters(), whole.adapters())
