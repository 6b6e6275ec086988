"""``python -m elsa_pl.experiments run SUITE.yaml`` and ``report FOLDER``."""

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from elsa_pl.errors import ConfigurationError, ElsaError
from elsa_pl.experiments.cells import Cell, Outcome, find_run, run_cells
from elsa_pl.experiments.results import checked, failed_before, read_before, set_aside, write_results
from elsa_pl.experiments.suites import CELLS_FOLDER, CPU_SIZE, Suite, choose, load_suite


def cells_of(suite: Suite, data_root: Path) -> list[Cell]:
    """All runs of a suite, seed by seed, so that what there is of an interrupted suite can be compared."""
    cells = []
    for seed in suite.seeds:
        for case, data_set, method in suite.combinations():
            config = suite.configuration(case, data_set, method)
            config |= {"seed_everything": seed, "data_root": str(data_root)}
            place = {"case": case, "data_set": data_set, "method": method, "seed": seed}
            cells.append(Cell(f"{data_set}-{method}-{case}-{seed}", config, place))
    return cells


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other call run suites into a folder meanwhile: each would leave what the other runs out of its table.

    Raises:
        ConfigurationError: another call does, or files cannot be locked there.
    """
    with ExitStack() as opened:
        try:
            lock = opened.enter_context((folder / ".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another call runs suites into {folder}: wait for its end, or give another --output"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"cannot lock {folder / '.lock'}: {error.strerror}: give another --output"
            ) from error
        yield


def run(args: argparse.Namespace) -> int:
    """Run a suite, and make its report."""
    suite = load_suite(args.suite, args.size)
    for kind, given, known in (
        ("method", args.methods, suite.methods),
        ("data_set", args.data_sets, suite.data_sets),
        ("case", args.cases, suite.cases),
        ("seed", args.seeds, suite.seeds),
    ):
        choose("--" + kind + "s", kind, given or [], known)
    output: Path = args.output.resolve()
    folder = output / suite.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make {folder}: {error.strerror}: give another --output") from error
    wanted = {"method": args.methods, "data_set": args.data_sets, "case": args.cases, "seed": args.seeds}
    cells = cells_of(suite, args.data_root.resolve())
    chosen = [cell for cell in cells if all(not names or cell.place[kind] in names for kind, names in wanted.items())]
    if not chosen:
        raise ConfigurationError(
            f"{args.suite} has no such runs, as its rules of skip leave them out: choose other methods or cases"
        )
    with alone_in(output):
        failed = run_chosen(suite, cells, chosen, output, args.jobs)
        report_on(folder)
    return 1 if failed else 0


def run_chosen(suite: Suite, cells: Sequence[Cell], chosen: Sequence[Cell], output: Path, jobs: int) -> int:
    """Run what has not ended well yet, and write the table after each run; returns how many of the chosen failed.

    Args:
        suite: what the table says of it.
        cells: all of the suite.
        chosen: those of them to be run.
        output: folder of suites and runs.
        jobs: runs at a time.
    """
    folder = output / suite.name
    before = read_before(folder)
    # all that there is of the suite goes into its table, whatever is chosen to run now
    outcomes = {outcome.cell.digest: outcome for outcome in failed_before(before, cells)} | {
        cell.digest: checked(Outcome(cell, found))
        for cell in cells
        if (found := find_run(output / CELLS_FOLDER, cell)) is not None
    }
    left = {cell.digest for cell in chosen if cell.digest not in outcomes or outcomes[cell.digest].run is None}
    if left:
        from elsa_pl.experiments.checks import check  # here because it takes seconds

        check([cell for cell in chosen if cell.digest in left])
    start, ran, total = time.monotonic(), 0, len({cell.digest for cell in chosen})
    print(f"{suite.title}: {total} runs, {jobs} at a time, into {folder}", flush=True)
    if len(left) < total:
        print(f"{total - len(left)} of them have ended well before", flush=True)

    def done(outcome: Outcome) -> None:
        nonlocal ran
        if outcome.cell.digest not in left:
            return
        left.remove(outcome.cell.digest)
        outcomes[outcome.cell.digest] = outcome = checked(outcome)
        write()
        ran += 1
        remaining_s = (time.monotonic() - start) / ran * len(left)
        figure = f"failed: {outcome.short_error}" if outcome.run is None else f"{outcome.seconds:.0f} s"
        print(f"[{total - len(left)}/{total}] {outcome.cell.name}: {figure}; {_time(remaining_s)} left", flush=True)

    def write() -> None:
        found = [
            Outcome(cell, outcome.run, outcome.error)
            for cell in cells
            if (outcome := outcomes.get(cell.digest)) is not None
        ]
        write_results(folder, {**suite.describe(), "num_runs": len(cells)}, found)

    readable = {digest for digest, outcome in outcomes.items() if outcome.run is not None}
    if (old := set_aside(folder, before, readable)) is not None:
        print(
            f"the table there was has runs that are not there any more, or not of the suite: kept as {old}", flush=True
        )
    if outcomes:
        write()
    run_cells(chosen, output / CELLS_FOLDER, jobs, done)
    failed = len({cell.digest for cell in chosen if outcomes[cell.digest].run is None})
    print(f"{total - failed} of {total} runs ended well, in {_time(time.monotonic() - start)}", flush=True)
    return failed


def report_on(folder: Path) -> None:
    """Write a suite's report, and say where it lies."""
    from elsa_pl.experiments.report import write_suite_report  # here because it takes matplotlib

    print(f"table:  {folder / 'results.csv'}\nreport: {write_suite_report(folder)}", flush=True)


def report(args: argparse.Namespace) -> int:
    """Make the report of a suite, or of a run, once more."""
    folder: Path = args.folder.resolve()
    if (folder / "summary.json").is_file():
        from elsa_pl.report.runs import write_run_report  # here because it takes matplotlib

        print(f"report: {write_run_report(folder)}", flush=True)
        return 0
    report_on(folder)
    return 0


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m elsa_pl.experiments", description="Suites of runs, and reports.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run what has not run, and make the report")
    running.add_argument("suite", type=Path, help="such as configs/suites/accuracy.yaml")
    running.add_argument("--data_root", type=Path, default=Path("data"), help="folder that configurations refer to")
    running.add_argument("--size", default=CPU_SIZE, help="of the suite; default: cpu")
    running.add_argument("--output", type=Path, default=Path("runs/experiments"), help="where suites and runs go")
    running.add_argument(
        "--jobs", type=_at_least_one, default=os.cpu_count() or 1, help="runs at a time; default: one per core"
    )
    for kind, what in (("methods", "methods"), ("data_sets", "data sets"), ("cases", "cases")):
        running.add_argument(f"--{kind}", nargs="+", help=f"only these {what}")
    running.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    running.set_defaults(do=run)
    reporting = commands.add_parser("report", help="make the report of a suite, or of a run, once more")
    reporting.add_argument("folder", type=Path, help="such as runs/experiments/accuracy, or a run's own")
    reporting.set_defaults(do=report)
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if runs failed or there is nothing to do, 130 after Ctrl-C."""
    parsed = parse(args)

    # Ctrl-C too, which whoever started this in the background may have had ignored; and a terminal that closes, but for
    # nohup, which is there for that
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def end(number: int, frame: FrameType | None) -> None:
        for seen in numbers:
            signal.signal(seen, signal.SIG_IGN)  # a second Ctrl-C must not keep the first from ending all runs
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        code: int = parsed.do(parsed)
    except ElsaError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped; what has ended is kept, and the same command goes on from there", file=sys.stderr)
        code = 130
        before.clear()  # a second Ctrl-C stays ignored until the process has ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _at_least_one(given: str) -> int:
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1; got {number}")
    return number


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
