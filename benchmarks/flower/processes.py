"""A command that leaves no process behind, whatever its own processes start and however it ends.

Ray's daemons put themselves into sessions of their own and outlive who started them, so neither a process group nor a
list of children finds them all. What they keep is the environment: the command gets a variable with a value of its own,
and whoever has it is ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, signal
from typing import Any
from uuid import uuid4

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
_MARK = "ELSA_PL_BENCHMARK"
_GRACE_S = 5.0


def run(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> float:
    """Run Python with arguments, one thread per process; returns when it started, in seconds since 1970.

    Args:
        arguments: of Python.
        log: what the command printed.
        environment: added to that of this process.

    Raises:
        SystemExit: the command failed; with the end of what it printed.
    """
    mark = uuid4().hex
    # Ray names its processes; without SPT_NOENV it writes the names over the environment that they show
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SPT_NOENV": "1", _MARK: mark, **(environment or {})}
    with log.open("w") as output:
        started = time.time()
        # a session of its own: Ctrl-C comes to this process, which then ends the others in order
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            end_marked(mark)
            process.wait()
    if code:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{' '.join(arguments)} failed, see {log}:\n{end}")
    return started


def marked(mark: str) -> list[psutil.Process]:
    """The processes that a command with this mark has started and that still run, and their children."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found |= {other.pid: other for other in [process, *process.children(recursive=True)]}
        except psutil.Error:  # gone, or of somebody else
            continue
    return list(found.values())


def end_marked(mark: str) -> None:
    """End the processes of a command: at first they are asked, and after some seconds they are killed."""
    known: dict[int, psutil.Process] = {}
    for action in ("terminate", "kill", "kill"):  # twice: between a look and its kill another one may have started
        known |= {process.pid: process for process in marked(mark)}
        for process in known.values():
            try:
                getattr(process, action)()
            except psutil.Error:
                continue
        _, alive = psutil.wait_procs(known.values(), timeout=_GRACE_S)
        known = {process.pid: process for process in alive}


def cpu_seconds() -> float:
    """CPU time of this process and of all that it has started and that still run."""
    used = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            used += sum(process.cpu_times()[:2])  # user and system
        except psutil.Error:
            continue
    return used


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let a request to end, or a closed terminal, run what stands in ``finally``, as Ctrl-C does, and once only."""
    # under nohup a terminal may close
    numbers = [number for number in (SIGINT, SIGTERM, SIGHUP) if number != SIGHUP or getsignal(SIGHUP) is not SIG_IGN]

    def leave(number: int, frame: Any) -> None:
        for seen in numbers:
            signal(seen, SIG_IGN)  # a second Ctrl-C must not keep the first from ending what runs
        if number == SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)
