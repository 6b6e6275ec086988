"""What crosses the network in training, validation and test: hidden states and adapters, but nothing private.

One real run of two processes is recorded in two ways: every TCP packet on the loopback interface, and everything that
RPC serializes in either process. A callback notes what the host computed on, and sends decoys of the same kinds, which
the search must find: a search that finds nothing would prove nothing without them.
"""

import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed.rpc.internal as rpc_internal
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.rpc import remote
from tests.runs import Run, run_forked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_LABELS = 4
BATCH_SIZE = 16
WORDS = ("river", "stone", "cloud", "green", "water", "paper", "light", "sound", "house", "table", "garden", "window")
SENT = ("ids", "labels", "logits", "text")


@dataclass
class Noted:
    """What a host computed on and with."""

    ids: list[list[int]] = field(default_factory=list)
    """Token ids of single examples, without padding."""
    labels: list[list[int]] = field(default_factory=list)
    """Labels of whole batches."""
    logits: list[list[float]] = field(default_factory=list)
    """Logits of single examples."""
    hidden: list[list[float]] = field(default_factory=list)
    """Hidden states of single tokens that the front gave."""


def decoys() -> Noted:
    """Made-up data of each kind, to be sent on purpose."""
    draw = random.Random(1)
    return Noted(
        ids=[[draw.randrange(1000, 30000) for _ in range(12)] for _ in range(3)],
        labels=[[draw.randrange(NUM_LABELS) for _ in range(BATCH_SIZE)]],
        logits=[[draw.gauss(0, 1) for _ in range(NUM_LABELS)] for _ in range(3)],
    )


DECOY_TEXT = "nobody would ever write this sentence about purple accordions"


class Recorder(Callback):
    """Runs in each process of the recorded run: notes, and at the end sends the decoys.

    Args:
        folder: where the notes go, as ``<worker>.pickle`` and, for what RPC serialized, ``<worker>.sent``.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._noted = Noted()
        self._sent: list[bytes] = []
        self._ports: set[int] = set()

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        pickler: Any = rpc_internal._InternalRPCPickler
        if stage != "fit":
            return
        serialize, sent = pickler.serialize, self._sent

        def serialize_and_note(own: Any, obj: Any) -> Any:
            packed, tensors = serialize(own, obj)
            sent.append(packed)
            sent.extend(bytes_of(tensor) for tensor in tensors)
            return packed, tensors

        pickler.serialize = serialize_and_note

    def on_train_batch_start(self, *_: object) -> None:
        self._ports |= own_ports()

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        strategy: Any = trainer.strategy
        for client in strategy.rounds.clients.values():
            client.front.register_forward_hook(self._note_front)
            client.tail.register_forward_hook(self._note_tail)

    def _note_front(self, module: object, args: tuple[Mapping[str, Tensor]], out: Tensor) -> None:
        for ids, mask in zip(args[0]["input_ids"], args[0]["attention_mask"], strict=True):
            self._noted.ids.append(ids[mask.bool()].tolist())
        self._noted.labels.append(args[0]["labels"].tolist())
        self._noted.hidden.append(out[0, 0].tolist())

    def _note_tail(self, module: object, args: object, out: Any) -> None:
        self._noted.logits += out.logits.tolist()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        strategy: Any = trainer.strategy
        if strategy.rounds.clients:
            fake = decoys()
            arrays = (torch.tensor(fake.ids), torch.tensor(fake.labels), torch.tensor(fake.logits))
            for index, value in enumerate((*arrays, fake.ids, fake.labels, fake.logits, DECOY_TEXT)):
                remote.call("cloud", "board", "post", ("decoy", index), "host-0", value, timeout_s=10.0)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        strategy: Any = trainer.strategy
        if stage == "test" and strategy.running:
            name = strategy.world.worker
            (self._folder / f"{name}.pickle").write_bytes(pickle.dumps(vars(self._noted)))
            (self._folder / f"{name}.ports").write_bytes(pickle.dumps(self._ports | own_ports()))
            (self._folder / f"{name}.sent").write_bytes(b"\n".join(self._sent))


def own_ports() -> set[int]:
    """TCP ports of this process' sockets."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:  # closed meanwhile
            continue
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/self/net/{name}").read_text().splitlines()]
    return {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[9] in mine}


def bytes_of(tensor: Tensor) -> bytes:
    """The elements of a tensor, as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Capture(threading.Thread):
    """All TCP payload on the loopback interface, by connection and direction.

    Raises:
        PermissionError: the process may not listen to the interface.
    """

    def __init__(self) -> None:
        super().__init__(name="capture", daemon=True)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self._socket.bind(("lo", 0))
        so_rcvbufforce, size = 33, 1 << 28
        self._socket.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, size)
        self._socket.settimeout(0.2)
        self._stopped = threading.Event()
        self._pieces: dict[tuple[bytes, bytes], dict[int, bytes]] = {}

    def run(self) -> None:
        last = float("inf")
        while time.monotonic() < last:
            if self._stopped.is_set():  # what is in the buffer still counts; other programs may never be quiet
                last = min(last, time.monotonic() + 2.0)
            try:
                packet, address = self._socket.recvfrom(1 << 18)
            except TimeoutError:
                continue
            if address[2] == socket.PACKET_OUTGOING:  # each packet is seen going out and coming in
                self._note(packet[14:])

    def _note(self, packet: bytes) -> None:
        if packet[0] >> 4 == 4:
            start, end, protocol = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big"), packet[9]
            ends = packet[12:20]
        else:
            start, end, protocol = 40, 40 + int.from_bytes(packet[4:6], "big"), packet[6]
            ends = packet[8:40]
        if protocol != socket.IPPROTO_TCP:
            return
        if end <= start:  # larger than the length field can say
            end = len(packet)
        segment = packet[start:end]
        (sequence,) = struct.unpack("!I", segment[4:8])
        payload = segment[(segment[12] >> 4) * 4 :]
        if payload:
            self._pieces.setdefault((ends, segment[:4]), {})[sequence] = payload

    def stop(self) -> dict[tuple[int, int], bytes]:
        """End the capture; returns the stream of each direction of each connection, by its ports.

        Raises:
            RuntimeError: the kernel dropped packets, so there is no telling what was in them.
        """
        self._stopped.set()
        self.join()
        sol_packet, packet_statistics = 263, 6
        _, dropped = struct.unpack("II", self._socket.getsockopt(sol_packet, packet_statistics, 8))
        self._socket.close()
        if dropped:
            raise RuntimeError(f"{dropped} packets were dropped")
        streams = {}
        for (_, ports), pieces in self._pieces.items():
            first = next(iter(pieces))  # numbers wrap around, so they count from the first piece
            order = sorted(pieces, key=lambda sequence: (sequence - first + (1 << 31)) % (1 << 32))
            streams[struct.unpack("!HH", ports)] = b"".join(pieces[sequence] for sequence in order)
        return streams


def count_contained(patterns: set[bytes], whole: bytes) -> int:
    """``sum(pattern in whole for pattern in patterns)`` in one pass, which looks for their last 8 bytes."""
    by_key: dict[int, list[bytes]] = {}
    for pattern in patterns:
        by_key.setdefault(int.from_bytes(pattern[-8:], "little"), []).append(pattern)
    keys = np.array(sorted(by_key), dtype="<u8")
    contained: set[bytes] = set()
    for offset in range(8):
        words = np.frombuffer(whole, dtype="<u8", offset=offset, count=max(0, len(whole) - offset) // 8)
        for place in np.flatnonzero(np.isin(words, keys)):
            end = offset + 8 * int(place) + 8
            candidates = by_key[int(words[place])]
            contained.update(pattern for pattern in candidates if whole.endswith(pattern, 0, end))
    return len(contained)


def found(noted: Noted, texts: list[str], streams: list[bytes]) -> dict[str, int]:
    """How many of the noted things of each kind are in the streams, in any of the usual number formats."""
    whole = b"\0\0\0\0".join(streams)

    def count(rows: list[Any], formats: tuple[str, ...]) -> int:
        arrays = {np.array(row, dtype=kind).tobytes() for row in rows for kind in formats}
        # without header and end, as the numbers stand in the pickle of any list or tuple
        pickled = {b"".join(pickle.dumps(number, protocol=2)[2:-1] for number in row) for row in rows}
        return count_contained(arrays | pickled, whole)

    # [CLS] and five more; one example's ids are enough
    ids = [row[:6] for row in noted.ids if len(row) >= 6]
    return {
        "ids": count(ids, ("int64", "int32", "int16", "float64", "float32")),
        "labels": count(noted.labels, ("int64", "int32", "int16", "uint8", "float64", "float32")),
        "logits": count(noted.logits, ("float64", "float32", "float16")),
        "text": count_contained({text.encode() for text in texts}, whole),
    }


@dataclass
class Recorded:
    """The run, what its host noted, and the recordings."""

    run: Run
    noted: Noted
    texts: list[str]
    serialized: dict[str, bytes]
    packets: list[bytes] | None
    no_packets_because: str = ""


def write_texts(path: Path, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 16))) for _ in range(count)]
    labels = [f"l{draw.randrange(NUM_LABELS)}" for _ in texts]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
    return texts


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A run in the layout ``tiers``, recorded."""
    folder = tmp_path_factory.mktemp("privacy")
    texts = write_texts(folder / "train.csv", 140, seed=0) + write_texts(folder / "test.csv", 40, seed=1)
    settings = {
        "data.train_file": str(folder / "train.csv"),
        "data.test_file": str(folder / "test.csv"),
        "data.partition": "iid",
        "data.num_clients": 3,
        "data.batch_size": BATCH_SIZE,
        "data.eval_batch_size": BATCH_SIZE,
        "strategy.layout": "tiers",
        "strategy.num_edges": 2,
        "strategy.edge_rounds": 2,
        "strategy.transport": "uv",  # shared memory would not cross the interface
        "trainer.callbacks": [
            {"class_path": "tests.test_privacy.Recorder", "init_args": {"folder": str(folder)}},
        ],
    }
    capture, reason = None, ""
    try:
        capture = Capture()
        capture.start()
    except (PermissionError, AttributeError) as error:
        reason = f"no raw socket on the loopback interface: {error!r}"
    try:
        run = run_forked(folder / "runs", "run", settings, num_processes=2)
    finally:
        captured = capture.stop() if capture is not None else None
    noted = Noted(**pickle.loads((folder / "host-0.pickle").read_bytes()))
    packets = None
    if captured is not None:  # other programs may use the interface too
        ports = set[int]().union(*(pickle.loads(path.read_bytes()) for path in folder.glob("*.ports")))
        packets = [stream for between, stream in captured.items() if ports.intersection(between)]
    serialized = {name: (folder / f"{name}.sent").read_bytes() for name in ("cloud", "host-0")}
    return Recorded(run, noted, texts, serialized, packets, reason)


@pytest.fixture(params=["packets", "serialized"])
def streams(request: pytest.FixtureRequest, recorded: Recorded) -> list[bytes]:
    """All that was sent, as either recording has it."""
    if request.param == "packets" and recorded.packets is None:
        pytest.skip(recorded.no_packets_because)
    return recorded.packets or [] if request.param == "packets" else list(recorded.serialized.values())


def test_the_notes_are_of_the_run(recorded: Recorded) -> None:
    steps = 3 * 2 * 2 * 2  # clients, rounds, edge rounds, local steps
    evaluated = 2 * 14 + 40  # validation in each round, test
    assert len(recorded.noted.ids) == len(recorded.noted.logits) == steps * BATCH_SIZE + evaluated
    assert sum(len(ids) >= 6 for ids in recorded.noted.ids) == len(recorded.noted.ids)
    assert all(len(set(labels)) > 1 for labels in recorded.noted.labels[:steps])


def test_hidden_states_cross(recorded: Recorded, streams: list[bytes]) -> None:
    """The recordings hold the payload as it is: without this, nothing could be found in them."""
    whole = b"\0\0\0\0".join(streams)
    missing = [row for row in recorded.noted.hidden if np.array(row, dtype="float32").tobytes() not in whole]
    assert not missing, f"{len(missing)} of {len(recorded.noted.hidden)} batches"


def test_recording_is_complete(recorded: Recorded) -> None:
    if recorded.packets is None:
        pytest.skip(recorded.no_packets_because)
    assert sum(map(len, recorded.packets)) > recorded.run.summary()["bytes"]["total"]


def test_decoys_are_found(streams: list[bytes]) -> None:
    """As tensors and as lists of numbers."""
    fake = decoys()
    assert found(fake, [DECOY_TEXT], streams) == {
        "ids": 2 * len(fake.ids),
        "labels": 2 * len(fake.labels),
        "logits": 2 * len(fake.logits),
        "text": 1,
    }


def test_nothing_private_crosses(recorded: Recorded, streams: list[bytes]) -> None:
    assert found(recorded.noted, recorded.texts, streams) == dict.fromkeys(SENT, 0)


def test_host_serializes_nothing_private(recorded: Recorded) -> None:
    """The host alone holds the data: what it serialized has hidden states, and of the data only the decoys."""
    sent = [recorded.serialized["host-0"]]
    assert np.array(recorded.noted.hidden[0], dtype="float32").tobytes() in sent[0]
    assert found(recorded.noted, recorded.texts, sent) == dict.fromkeys(SENT, 0)
