"""What users get wrong: one line that says expected, got and what to do, before anything is trained or written."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elsa_pl import cli
from tests.runs import ROOT, fork_all

STRATEGY = "--trainer.strategy.init_args."
TOKENIZER = "bundled:all-MiniLM-L6-v2"
BERT = (
    "{model_type: bert, hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 64,"
    " vocab_size: 30522}"
)
ROWS = ["text,label", *(f"the river number {index} is wide,l{index % 4}" for index in range(48))]
VARIABLE = "ELSA_TEST_BAD_INPUT"

# what is wrong, the arguments that make it so, and words that the error must have
Case = tuple[str, list[str], list[str]]
CASES: list[Case] = [
    ("cut", ["--model.plan.front", "3"], ["front=3", "num_layers=4", "lower front or tail"]),
    (
        "cut-middle",
        ["--model.plan", "{front: 1, middle: 1, tail: 1}"],
        ["middle=1", "num_layers=4", "leave middle out"],
    ),
    ("cut-zero", ["--model.plan.front", "0"], ["1 <= front", "front=0"]),
    ("cut-of-a-client", ["--model.client_plans", "{client-1: {front: 4}}"], ["front=4", "num_layers=4"]),
    ("plan-of-nobody", ["--model.client_plans", "{client-9: {front: 1}}"], ["client_plans", "client-9", "client-3"]),
    ("rank-of-nobody", ["--model.client_ranks", "{client-9: 1}"], ["client_ranks", "client-9", "client-3"]),
    ("rank-too-high", ["--model.client_ranks", "{client-1: 9}"], ["client-1: 9", "lora.rank=8", "lower it"]),
    ("ranks-and-mean", ["--model.client_ranks", "{client-1: 4}"], ["aggregator=exact", "'mean'", "client_ranks"]),
    ("more-edges", [f"{STRATEGY}num_edges", "9"], ["num_edges=9", "4 clients", "lower num_edges"]),
    ("more-hosts", [f"{STRATEGY}layout", "tiers", f"{STRATEGY}num_hosts", "9"], ["num_hosts=9", "lower num_hosts"]),
    ("edge-of-nobody", [f"{STRATEGY}edge_of", "{client-7: edge-0}"], ["edge_of", "client-7", "client-3"]),
    ("edge-of-nowhere", [f"{STRATEGY}edge_of", "{client-0: edge-5}"], ["edge_of", "edge-5", "edge-0"]),
    (
        "skewed",
        ["--data.partition", "dirichlet", "--data.alpha", "0.001"],
        ["client-", "(0)", "alpha=0.001", "num_clients=4", "works"],
    ),
    ("many-clients", ["--data.num_clients", "500"], ["500 clients", "use num_clients <= "]),
    ("many-shards", ["--data.partition", "shards", "--data.shards_per_client", "300"], ["300", "shards"]),
    ("no-file", ["--data.train_file", "nowhere.csv"], ["train_file", "nowhere.csv", "there are ", "binary.csv"]),
    ("no-test-file", ["--data.test_file", "nowhere.csv"], ["test_file", "nowhere.csv"]),
    ("no-source", ["--data.train_file", "null"], ["dataset", "train_file", "give one of them"]),
    ("extension", ["--data.train_file", "train.txt"], [".csv", "train.txt", "convert or rename"]),
    ("no-column", ["--data.text_column", "sentence"], ["'sentence'", "text, label", "text_column"]),
    ("no-label-column", ["--data.label_column", "class"], ["'class'", "text, label", "label_column"]),
    ("empty-label", ["--data.train_file", "empty_label.csv"], ["'label'", "empty_label.csv", "row 49", "fill it"]),
    ("empty-text", ["--data.train_file", "empty_text.csv"], ["'text'", "empty_text.csv", "row 49", "fill it"]),
    ("one-label", ["--data.train_file", "one_label.csv"], ["two different labels", "['x']"]),
    ("header-only", ["--data.train_file", "header.csv"], ["header.csv", "rows"]),
    ("empty-file", ["--data.train_file", "empty.csv"], ["empty.csv"]),
    ("binary-file", ["--data.train_file", "binary.csv"], ["UTF-8", "binary.csv", "repair it"]),
    ("bad-json", ["--data.train_file", "bad.json"], ["bad.json", "line 1", "repair"]),
    ("bad-parquet", ["--data.train_file", "bad.parquet"], ["bad.parquet"]),
    ("new-label", ["--data.test_file", "new_label.csv"], ["test", "l0, l1, l2, l3", "'zebra'", "row 1"]),
    ("label-not-given", ["--data.labels", "[l0, l1, l2]"], ["data.labels", "'l3'", "add it"]),
    ("model", ["--model.model", "no/such", "--model.model_config", "null"], ["hub id", "'no/such'", "check"]),
    ("model-folder", ["--model.model", "./none", "--model.model_config", "null"], ["'./none'", "no such folder"]),
    ("bundled-model", ["--model.model", "bundled:none", "--model.model_config", "null"], [TOKENIZER, "bundled:none"]),
    ("two-models", ["--model.model", TOKENIZER], ["either model", "or model_config"]),
    ("model-type", ["--model.model_config", "{model_type: bertt}"], ["'bertt'", "check its spelling"]),
    ("no-model-type", ["--model.model_config", "{hidden_size: 32}"], ["model_type", "hidden_size"]),
    ("model-value", ["--model.model_config", BERT.replace("32,", "wide,", 1)], ["hidden_size", "int", "'wide'"]),
    ("model-sizes", ["--model.model_config", BERT.replace("32,", "33,", 1)], ["33", "4"]),
    ("albert", ["--model.model_config", BERT.replace("bert", "albert")], ["albert", "shares one block"]),
    ("encoder-decoder", ["--model.model_config", "{model_type: t5, d_model: 32, num_layers: 4}"], ["encoder-decoder"]),
    ("tokenizer", ["--data.tokenizer", "no/such"], ["'no/such'", "check name and network"]),
    ("no-tokenizer", ["--data.tokenizer", "null"], ["data.tokenizer"]),
    ("vocabulary", ["--model.model_config", BERT.replace("30522", "100")], ["30522", "100", "data.tokenizer"]),
    ("lora-rank", ["--model.lora.rank", "0"], ["rank >= 1", "got 0"]),
    (
        "lora-target",
        ["--model.lora.target_modules", "[none]"],
        ["'none'", "attention.self.query", "set target_modules"],
    ),
    (
        "two-holes",
        ["--model.plan", "{front: 2, middle: 0, tail: 2}"],
        ["middle == tail == 0", "front=2, middle=0, tail=2"],
    ),
    (
        "links-of-an-uncut-model",
        ["--model.plan", "{front: 4, middle: 0, tail: 0}", "--trainer.callbacks+", "LinkQuantization"],
        ["no links", "leave out", "model.plan"],
    ),
    (
        "links-of-a-client-that-is-not-cut",
        [
            *["--model.client_plans", "{client-1: {front: 4, middle: 0, tail: 0}}"],
            *["--trainer.callbacks+", "LinkQuantization"],
        ],
        ["no links", "leave out", "model.client_plans"],
    ),
    (
        "pooling-without-a-link",
        ["--model.plan", "{front: 1, middle: 3, tail: 0}", "--model.token_pooling.downlink", "first"],
        ["token_pooling.downlink", "without a tail", "leave it out"],
    ),
    (
        "audit-without-a-tail",
        [
            *["--model.plan", "{front: 1, middle: 3, tail: 0}", "--data.num_probes", "8"],
            *["--trainer.callbacks+", "PrivacyAudit"],
        ],
        ["PrivacyAudit", "without a tail", "leave it out"],
    ),
    ("device", [f"{STRATEGY}client_device", "cuda:9"], ["client_device='cuda:9'", "use cpu"]),
    ("edge-device", [f"{STRATEGY}edge_device", "cuda:9"], ["edge_device='cuda:9'", "use cpu"]),
    ("device-name", [f"{STRATEGY}edge_device", "gpu"], ["edge_device", "'gpu'", "cuda:0"]),
    ("device-type", [f"{STRATEGY}edge_device", "meta"], ["edge_device", "'meta'", "cuda"]),
    ("port-range", [f"{STRATEGY}port", "99999"], ["port", "99999", "0 takes any"]),
    ("role", [f"{STRATEGY}role", "host"], ["role and name", "'single'", "leave them out"]),
    ("site-without-role", [f"{STRATEGY}layout", "site"], ["role=None", "set role"]),
    ("site-without-name", [f"{STRATEGY}layout", "site", f"{STRATEGY}role", "host"], ["name=None", "a name"]),
    (
        "site-without-labels",
        [f"{STRATEGY}layout", "site", f"{STRATEGY}role", "host", f"{STRATEGY}name", "north"],
        ["labels", "north", "data.labels"],
    ),
    (
        "site-without-torchrun",
        [
            *[f"{STRATEGY}layout", "site", f"{STRATEGY}role", "host", f"{STRATEGY}name", "north"],
            *["--data.labels", "[l0, l1, l2, l3]"],
        ],
        ["torchrun", "--node_rank"],
    ),
    ("participation", [f"{STRATEGY}participation", "0"], ["participation", "(0, 1]", "0.0"]),
    ("aggregator", [f"{STRATEGY}aggregator", "meen"], ["aggregator", "'meen'", "'mean'"]),
    (
        "alone-in-processes",
        [f"{STRATEGY}aggregator", "none", f"{STRATEGY}layout", "tiers"],
        ["aggregator='none'", "layout='tiers'", "single"],
    ),
    ("no-checkpoint", ["--ckpt_path", "none.ckpt"], ["ckpt_path", "'none.ckpt'"]),
    ("checkpoint-folder", ["--ckpt_path", "."], ["ckpt_path", "'.'"]),
    ("checkpoint-of-others", ["--ckpt_path", "other.ckpt"], ["ckpt_path", "'other.ckpt'"]),
    ("checkpoint-broken", ["--ckpt_path", "train.csv"], ["ckpt_path", "'train.csv'"]),
    ("fp16", ["--trainer.precision", "16-mixed"], ["16-mixed", "scaler", "bf16-mixed"]),
    ("low-precision", ["--trainer.precision", "bf16-true"], ["bf16-true", "bf16-mixed"]),
    ("max-steps", ["--trainer.max_steps", "5"], ["max_steps", "max_epochs"]),
    ("limit-batches", ["--trainer.limit_train_batches", "3"], ["limit_train_batches", "local_steps"]),
    ("val-interval", ["--trainer.val_check_interval", "0.5"], ["val_check_interval", "check_val_every_n_epoch"]),
    ("clipping", ["--trainer.gradient_clip_val", "1.0"], ["gradient_clip_val", "model.gradient_clip_val"]),
    ("accumulation", ["--trainer.accumulate_grad_batches", "2"], ["model.accumulate_grad_batches"]),
    ("gpu", ["--trainer.accelerator", "cuda", "--trainer.devices", "99"], ["CUDAAccelerator", "'cpu'"]),
    ("other-strategy", ["--trainer.strategy", "ddp"], ["trainer.strategy", "HierarchicalStrategy", "DDPStrategy"]),
]


def write_files(folder: Path) -> None:
    def write(name: str, *rows: str) -> None:
        (folder / name).write_text("\n".join(rows) + "\n" * bool(rows))

    write("train.csv", *ROWS)
    write("train.txt", *ROWS)
    write("test.csv", *ROWS[:9])
    write("empty_label.csv", *ROWS, "hello,")
    write("empty_text.csv", *ROWS, " ,l1")
    write("one_label.csv", "text,label", *(f"river {index},x" for index in range(30)))
    write("header.csv", "text,label")
    write("empty.csv")
    (folder / "binary.csv").write_bytes(b"text,label\n\xff\xfe\x00,1\n")
    write("bad.json", "{a}")
    write("bad.parquet", "a")
    write("new_label.csv", "text,label", "hello there,zebra")
    torch.save({"state_dict": {}}, folder / "other.ckpt")


def basics() -> list[str]:
    return [
        *("fit", "--model.model", "null", "--model.model_config", BERT, "--data.tokenizer", TOKENIZER),
        *("--data.train_file", "train.csv", "--data.test_file", "test.csv", "--data.num_clients", "4"),
        *("--data.partition", "iid", "--trainer.max_epochs", "1", f"{STRATEGY}local_steps", "1"),
    ]


def marked_processes(value: str) -> list[int]:
    """Other processes whose environment has our variable with this value."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if f"{VARIABLE}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def the_error(out: str, err: str, words: list[str]) -> str:
    """Check what was printed; returns the one line of the error."""
    assert "Traceback" not in out + err
    assert "round 1" not in out, "something was trained"
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.strip().splitlines()[-1] == line, "the error is one line, and the last one"
    for word in words:
        assert word in line
    return line


@pytest.fixture
def folder(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with files; afterwards neither a new file nor a process may be there."""
    write_files(workdir)
    monkeypatch.setenv(VARIABLE, str(workdir))
    before = sorted(workdir.iterdir())
    yield workdir
    assert sorted(workdir.iterdir()) == before, "stray files"
    assert not marked_processes(str(workdir)), "a process was left"


@pytest.mark.parametrize(("extra", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_settings(extra: list[str], words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*basics(), *extra]) == 1
    the_error(*capfd.readouterr(), words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--data.alfa", "1"], ["data.alfa"]),
        ([f"{STRATEGY}num_edge_servers", "3"], ["num_edge_servers"]),
        ([f"{STRATEGY}layout", "ring"], ["layout", "'tiers'", "ring"]),
        (["--data.partition", "random"], ["partition", "'dirichlet'", "random"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--trainer.callbacks", "[TrustScorin]"], ["trainer.callbacks", "TrustScorin: did you mean TrustScoring?"]),
        (["--model.optimizer", "Adamw"], ["model.optimizer", "Adamw: did you mean AdamW?"]),
        (["--trainer.logger", "[Ring]"], ["trainer.logger", "no class Ring", "my_module.Ring"]),
        (["--config", "unknown_key.yaml"], ["modle"]),
    ],
)
def test_what_does_not_parse(
    extra: list[str], words: list[str], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workdir / "unknown_key.yaml").write_text("modle: {model: gpt2}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *extra])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    message = err[err.rindex("\nerror: ") :]
    for word in words:
        assert word in message
    assert [path.name for path in workdir.iterdir()] == ["unknown_key.yaml"]


@pytest.mark.parametrize(
    ("content", "words"), [("data: [1]", ["data", "[1]"]), ("model: {lora: 5}", ["model.lora", "5"])]
)
def test_settings_without_names(
    content: str,
    words: list[str],
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """jsonargparse would go on without them."""
    path = tmp_path_factory.mktemp("else") / "unnamed.yaml"
    path.write_text(content + "\n")
    assert cli.main([*basics(), "--config", str(path)]) == 1
    the_error(*capfd.readouterr(), [*words, "give them names"])


def test_advice_on_a_partition_can_be_followed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    skewed = [*basics(), "--data.partition", "dirichlet", "--data.alpha", "0.001"]
    assert cli.main(skewed) == 1
    line = the_error(*capfd.readouterr(), [])
    alpha = line.split("with the same seed alpha=")[1].split()[0]
    # an edge too many stops it right after the partition
    assert cli.main([*skewed, "--data.alpha", alpha, f"{STRATEGY}num_edges", "9"]) == 1
    the_error(*capfd.readouterr(), ["num_edges=9"])


@pytest.mark.parametrize("layout", ["single", "tiers"])
def test_port_in_use(layout: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main([*basics(), f"{STRATEGY}layout", layout, f"{STRATEGY}port", port]) == 1
    the_error(*capfd.readouterr(), [f"127.0.0.1:{port}", "another program", "choose another port"])
    for log in folder.glob("runs/run/*/logs/*.log"):  # of the children, who were started before
        assert "Traceback" not in log.read_text()
    remove_logs(folder)


def remove_logs(folder: Path) -> None:
    """Delete the children's logs, and no more: what else there is counts as stray."""
    for log in folder.glob("runs/run/*/logs/*.log"):
        log.unlink()
    for empty in sorted(folder.glob("runs/**/"), reverse=True):
        if empty.is_dir():
            empty.rmdir()


@pytest.mark.parametrize(
    ("layout", "given", "words"),
    [
        ("tiers", 1, ["'tiers'", "needs 2 processes (cloud, host-0)", "got 1", "torchrun's process count"]),
        ("full", 2, ["'full'", "needs 3 processes (cloud, edge-0, host-0)", "got 2"]),
        ("single", 3, ["'single'", "needs 1 processes", "got 3"]),
    ],
)
def test_wrong_number_of_processes(
    layout: str,
    given: int,
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": str(given), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*basics(), f"{STRATEGY}layout", layout]) == 1
    the_error(*capfd.readouterr(), words)


@pytest.mark.timeout(300)
def test_torchrun_with_too_few_processes(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [*torchrun, str(ROOT / "train.py"), *basics(), f"{STRATEGY}layout", "tiers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode != 0
    ours, theirs = done.stderr.split("Traceback", 1)  # torchrun's own account of the failure
    assert "elsa_pl" not in theirs
    assert "error: layout 'tiers' with num_edges=1 and num_hosts=1 needs 2 processes (cloud, host-0); got 1" in ours


NAMES = {name: [f"{STRATEGY}name", name] for name in ("cloud", "north", "sky")}
SITES = {
    "duplicate-name": ([("cloud", []), ("host", NAMES["cloud"])], ["'cloud'", "ranks [0, 1]", "name"]),
    "no-edge": ([("cloud", []), ("host", NAMES["north"])], ["1 x cloud", "0 x edge", "1 x host", "set role"]),
    "two-clouds": ([("cloud", []), ("cloud", NAMES["sky"])], ["'cloud'", "cloud: cloud", "sky: cloud"]),
}


def test_an_edge_counts_its_probes_before_it_meets_the_others(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody else is there to be met, so another check would wait for them."""
    (folder / "probes.csv").write_text("text\n" + "".join(f"a text of {number} words\n" for number in range(8)))
    site = [f"{STRATEGY}layout", "site", f"{STRATEGY}role", "edge", f"{STRATEGY}name", "north"]
    site += ["--data.labels", "[l0, l1, l2, l3]", "--data.probe_file", "probes.csv"]
    callback = ["--trainer.callbacks+=BehaviorClustering", "--trainer.callbacks.width=8"]
    assert cli.main([*basics(), *site, *callback]) == 1
    the_error(*capfd.readouterr(), ["BehaviorClustering", "12", "8", "width"])
    (folder / "probes.csv").unlink()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SITES)
def test_sites_that_do_not_fit_together(name: str, workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_files(workdir)
    before = sorted(workdir.iterdir())
    places, words = SITES[name]
    commands = [
        [*basics(), "--data.labels", "[l0, l1, l2, l3]", f"{STRATEGY}layout", "site", f"{STRATEGY}role", role, *extra]
        for role, extra in places
    ]
    first, *others = fork_all(commands, tmp_path_factory.mktemp("outputs"), workdir=workdir)
    the_error(first.out, first.err, words)
    assert first.returncode == 1
    for other in others:
        assert other.returncode == 1
        assert "Traceback" not in other.out + other.err
    assert sorted(workdir.iterdir()) == before, "stray files"
