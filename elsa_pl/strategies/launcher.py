"""Starts the further processes of a layout on this machine, and ends them.

Lightning's own launcher re-executes ``sys.argv`` (under pytest that is pytest again) and kills every process when one
of them fails. Ours runs ``python -m elsa_pl.cli`` with the arguments that `elsa_pl.cli.main` was given, and leaves the
survivors alone: whether the run can go on without a process is for the strategy to say.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.launcher import _Launcher

import elsa_pl
from elsa_pl.errors import LaunchError

# set by elsa_pl.cli.main: the arguments of this run
arguments: Sequence[str] | None = None

_PATIENCE_S = 5.0


class Processes:
    """The child processes of a run.

    Args:
        log_dir: where each child's output goes, as ``<name>.log``.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._new_folders: list[Path] = []
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, names: Sequence[str], port: int, num_threads: int) -> None:
        """Start ranks 1, 2, ... under their RPC names.

        Raises:
            LaunchError: the run did not come from `elsa_pl.cli.main`, so there is nothing to run again.
        """
        if arguments is None:
            raise LaunchError(
                "this layout starts further processes by running the elsa_pl command again, but this run did not come"
                " from it: use elsa_pl.cli.main, start the processes with torchrun, or choose layout 'single'"
            )
        self._new_folders = [folder for folder in (self.log_dir, *self.log_dir.parents) if not folder.exists()]
        self.log_dir.mkdir(parents=True, exist_ok=True)
        root = str(Path(elsa_pl.__file__).parent.parent)
        for rank, name in enumerate(names, start=1):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(names) + 1),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
                "OMP_NUM_THREADS": str(num_threads),
                "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            }
            with (self.log_dir / f"{name}.log").open("wb") as log:
                # a session of its own: Ctrl-C reaches the first process only, which ends the others in order
                self._children[name] = subprocess.Popen(
                    [sys.executable, "-m", "elsa_pl.cli", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def check(self) -> None:
        """Raise if a child has ended already.

        Raises:
            LaunchError: with the end of its log.
        """
        for name, child in self._children.items():
            if child.poll() is not None:
                raise LaunchError(f"{name} ended with exit code {child.returncode} at start:\n{self.tail(name)}")

    def tail(self, name: str, lines: int = 15) -> str:
        """The last lines of a child's log, and where it lies."""
        path = self.log_dir / f"{name}.log"
        text = path.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- {path}", *text])

    def undo(self) -> None:
        """End the children at once, before they have met anybody, and leave nothing of them behind."""
        self.end(patience_s=0.0)
        for name in self._children:
            (self.log_dir / f"{name}.log").unlink()
        for folder in self._new_folders:
            if not any(folder.iterdir()):
                folder.rmdir()

    def end(self, patience_s: float) -> None:
        """Wait ``patience_s`` for the children to end by themselves, then terminate and at last kill them."""
        for sent, wait_s in ((None, patience_s), (signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, _PATIENCE_S)):
            running = [child for child in self._children.values() if child.poll() is None]
            if sent is not None:
                for child in running:
                    child.send_signal(sent)
            deadline = time.monotonic() + wait_s
            while running and time.monotonic() < deadline:
                time.sleep(0.02)
                running = [child for child in running if child.poll() is None]


class LayoutLauncher(_Launcher):
    """Runs ``connect`` before the first Trainer function: that brings the processes of the layout together."""

    def __init__(self, connect: Callable[[], None]) -> None:
        self._connect = connect

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: "pl.Trainer | None" = None, **kwargs: Any
    ) -> Any:
        self._connect()
        return function(*args, **kwargs)

    def kill(self, signum: "int | signal.Signals") -> None:
        """Lightning passes SIGTERM on through this; our children are ended by `Processes.end`."""
