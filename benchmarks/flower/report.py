"""The tables and the picture."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks.flower.outcome import Outcome
from elsa_pl.callbacks import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[str, Mapping[int, Outcome]]
"""By system and seed; the systems in the order of `benchmarks.flower.outcome.RUN`."""

LOOKS = ("-", "--")
"""Lines of the two systems."""


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the range.

    Example:
        >>> spread([3.0, 1.0, 2.0], 1)
        '2.0 (1.0 to 3.0)'
    """
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def cost_table(found: Found) -> str:
    """Seconds and bytes of the two systems, over all seeds; rounds from the second on, as the first may load things."""

    def over_rounds(values: Callable[[Outcome], Sequence[float]]) -> Callable[[Sequence[Outcome]], list[float]]:
        return lambda runs: [value for run in runs for value in values(run)[1:]]

    rows: list[tuple[str, int, Callable[[Sequence[Outcome]], list[float]]]] = [
        ("start-up, s", 1, lambda runs: [run.startup_s for run in runs]),
        ("a round, s", 2, over_rounds(lambda run: run.round_s)),
        ("a round, CPU s", 2, over_rounds(lambda run: run.cpu_s)),
        ("a round, MB down", 3, over_rounds(lambda run: [count / 1e6 for count in run.down_bytes])),
        ("a round, MB up", 3, over_rounds(lambda run: [count / 1e6 for count in run.up_bytes])),
    ]
    lines = [f"{'':<20}" + "".join(f"{system:>28}" for system in found)]
    for name, digits, values in rows:
        cells = [spread(values(list(runs.values())), digits) for runs in found.values()]
        lines.append(f"{name:<20}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def accuracy_table(found: Found) -> str:
    """Accuracies in %, round by round: both systems and the difference, for each seed."""
    first, second = found.values()
    lines = [
        f"{'':<20}" + "".join(f"{f'seed {seed}':^28}" for seed in first),
        f"{'accuracy, %':<20}" + "".join("".join(f"{name:>9}" for name in (*found, "less")) + " " for _ in first),
    ]
    num_rounds = len(next(iter(first.values())).val_accuracy)
    places: list[tuple[str, int | None]] = [(f"val, round {number + 1}", number) for number in range(num_rounds)]
    for place, number in [*places, (f"test, round {num_rounds}", None)]:
        cells = []
        for seed in first:
            one, other = (
                100 * (run.test_accuracy if number is None else run.val_accuracy[number])
                for run in (first[seed], second[seed])
            )
            less = round(one - other, 2) + 0.0  # no minus in front of a zero
            cells.append(f"{one:>9.2f}{other:>9.2f}{less:>+9.2f} ")
        lines.append(f"{place:<20}" + "".join(cells))
    return "\n".join(lines)


def distance(one: Outcome, other: Outcome, round: int) -> tuple[float, float]:
    """How far apart the global adapters of two runs are after a round.

    Returns:
        - the largest difference of an element;
        - the Euclidean norm of all differences, relative to that of the adapters.
    """
    mine, theirs = one.adapters(round), other.adapters(round)
    assert mine.keys() == theirs.keys()
    left, right = (torch.cat([values[name].double().flatten() for name in sorted(mine)]) for values in (mine, theirs))
    return float((left - right).abs().max()), float((left - right).norm() / right.norm())


def distance_table(found: Found) -> str:
    """How far apart the global adapters are, round by round: largest difference, and relative norm."""
    first, second = found.values()
    lines = [f"{'adapters differ':<20}" + "".join(f"{f'seed {seed}':^28}" for seed in first)]
    for round in range(1, len(next(iter(first.values())).val_accuracy) + 1):
        pairs = [distance(first[seed], second[seed], round) for seed in first]
        cells = [f"{f'{largest:.1e} at most, {relative:.1e}':>27} " for largest, relative in pairs]
        lines.append(f"{f'round {round}':<20}" + "".join(cells))
    return "\n".join(lines)


def largest_difference(found: Found) -> float:
    """The largest difference of validation accuracies of any round and seed, in points."""
    first, second = found.values()
    return 100 * max(
        abs(one - other)
        for seed in first
        for one, other in zip(first[seed].val_accuracy, second[seed].val_accuracy, strict=True)
    )


def draw(found: Found) -> "Figure":
    """Accuracy by round of both systems, and what a round takes."""
    from matplotlib.ticker import MaxNLocator

    figure = drawing.new_figure(8.5, 3.8)
    accuracy, seconds = figure.subplots(1, 2, width_ratios=(2.2, 1))
    seeds = list(next(iter(found.values())))
    colours = dict(zip(seeds, drawing.colours(len(seeds)), strict=True))
    for look, runs in zip(LOOKS, found.values(), strict=True):
        for seed, run in runs.items():
            rounds = range(1, len(run.val_accuracy) + 1)
            # the second system's line is thinner and on top: where both agree, both are seen
            accuracy.plot(
                rounds,
                [100 * value for value in run.val_accuracy],
                linestyle=look,
                linewidth=3.0 if look == "-" else 1.4,
                alpha=0.45 if look == "-" else 1.0,
                color=colours[seed],
            )
    accuracy.set(xlabel="round", ylabel="validation accuracy, %")
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    entries = [drawing.entry(system, colour="#333333", line=look) for look, system in zip(LOOKS, found, strict=True)]
    entries += [drawing.entry(f"seed {seed}", "s", colours[seed]) for seed in seeds]
    accuracy.legend(handles=entries, fontsize=drawing.FONT_PT, loc="best")
    for place, runs in enumerate(found.values()):
        for index, (seed, run) in enumerate(runs.items()):
            at = [place + 0.18 * (index - (len(runs) - 1) / 2)] * (len(run.round_s) - 1)
            seconds.plot(at, run.round_s[1:], "o", color=colours[seed], markersize=4, alpha=0.7)
        median = statistics.median(value for run in runs.values() for value in run.round_s[1:])
        seconds.hlines(median, place - 0.35, place + 0.35, color=drawing.DARK)
    seconds.set_xticks(range(len(found)), list(found))
    seconds.set_xlim(-0.6, len(found) - 0.4)
    seconds.set_ylim(bottom=0)
    seconds.set_ylabel("seconds of a round, and their median")
    for axes in (accuracy, seconds):
        drawing.style(axes)
    first, second = found
    drawing.title(
        figure,
        f"{first} and {second} on the same task: validation accuracies differ by at most"
        f" {largest_difference(found):.2f} points",
    )
    return figure
