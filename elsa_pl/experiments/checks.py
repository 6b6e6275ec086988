"""What a suite checks before anything runs, so that hours later no run ends with an error that could have been known.

That the files of its data are there, and all settings as far as they can be tried without reading data. It is a file of
its own because it imports what train.py does, which takes seconds.
"""

import contextlib
import io
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elsa_pl import cli
from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments.cells import Cell, error_of
from elsa_pl.strategies.checks import refuse_unsupported

_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""How train.py ends then."""

_ANY_NUM_LABELS = 2


class _CheckingCLI(cli.ElsaCLI):
    """Makes all that a run is made of, and runs nothing."""

    def before_fit(self) -> None:
        refuse_unsupported(self.trainer)
        self.check_model(_ANY_NUM_LABELS)

    def fit(self, **kwargs: Any) -> None:
        pass

    def after_fit(self) -> None:
        pass


def check(cells: Sequence[Cell]) -> None:
    """Look for the data of one seed's cells, and try their settings out.

    Raises:
        ConfigurationError: with the first file that is not there, or settings that are refused.
    """
    cells = [cell for cell in cells if cell.place["seed"] == cells[0].place["seed"]]
    for cell in cells:
        data = cell.config.get("data")
        for name, value in data.items() if isinstance(data, Mapping) else ():
            given = str(value).replace("${data_root}", str(cell.config["data_root"]))
            if name.endswith("_file") and value is not None and not Path(given).is_file():
                raise ConfigurationError(f"{cell.name} needs data.{name}, and there is no {given}: correct --data_root")
    print(f"checking the settings of {len(cells)} runs", flush=True)
    with TemporaryDirectory(prefix="elsa-check-") as folder:
        for cell in cells:
            cell.write(path := Path(folder, "check.yaml"))
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    code = cli.main(["fit", "--config", str(path), "--output_dir", folder], _CheckingCLI)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except Exception as error:  # of a class that settings name, such as somebody's callback
                raise ConfigurationError(f"{cell.name}: {type(error).__name__}: {error}") from error
            if code in _INTERRUPTED:
                signal.raise_signal(code - 128)  # train.py has taken it, and it was meant for the suite
            if code:
                raise ConfigurationError(f"{cell.name}: {error_of(said.getvalue(), code).removeprefix('error: ')}")
