"""Live progress of the rounds on the terminal: a bar for all, one for each site at work; one line a round stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import Tensor

    from fedsca_pipeline.federation.fleets.fleet import Fleet
    from fedsca_pipeline.federation.run import RunFolder
    from fedsca_pipeline.federation.server.checkpoint import RoundRecord
    from fedsca_pipeline.federation.setup import Setup


class RoundProgress:
    """A context manager that watches a run; its methods are the callbacks of the fleet and the round loop."""

    def __init__(self, sites: Sequence[str], rounds: int, console: Console | None = None) -> None:
        self._count, self._rounds = len(sites), rounds
        self._bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._done = 0
        self._total = self._bars.add_task("rounds", total=rounds, note="")
        self._at_work: dict[str, TaskID] = {}
        self._parts: dict[str, float] = {}

    def __enter__(self) -> RoundProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()

    def step(self, site: str, step: int, steps: int, loss: float | None) -> None:
        """Report one local step: ``step`` of ``steps``, counted from 1, and its loss, if it is known."""
        # A round is one unit, its sites are equal parts of it: the time left follows the steps.
        self._parts[site] = step / steps
        self._bars.update(self._total, completed=self._done + sum(self._parts.values()) / self._count)
        if site not in self._at_work:
            self._at_work[site] = self._bars.add_task(site, total=steps, note="")
        self._bars.update(self._at_work[site], completed=step, note="" if loss is None else f"loss {loss:.3f}")
        if step == steps:
            self._bars.remove_task(self._at_work.pop(site))

    def round_done(self, record: RoundRecord) -> None:
        """Report a finished round: mean loss and Dice over the sites that took part, and who did not."""
        present = {site: r for site, r in record.sites.items() if r.absent is None}
        # Dice in a record is of the round before: the model that each site had when the round began.
        dice = _mean([r.dice_validation for r in present.values()])
        loss = _mean([r.loss for r in present.values()])
        self._done = min(record.round, self._rounds)
        self._parts.clear()
        for site in list(self._at_work):  # those that failed on their way
            self._bars.remove_task(self._at_work.pop(site))
        self._bars.update(self._total, completed=self._done, note=f"Dice {dice}")
        traffic = sum(entry.bytes_up for entry in present.values()) / 1e6
        self._bars.console.print(
            f"round {record.round - 1}/{self._rounds}: validation Dice {dice}"
            if record.final
            else f"round {record.round}/{self._rounds}: loss {loss}, Dice of round {record.round - 1} {dice}, "
            f"{len(present)} of {len(record.sites)} sites, {traffic:.2f} MB up",
            highlight=False,
        )
        for site, entry in record.sites.items():
            if entry.absent and not record.final:
                self._bars.console.print(f"  {site}: absent ({entry.absent})", highlight=False)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def serve(
    fleet: Fleet,
    progress: RoundProgress,
    setup: Setup,
    start: Mapping[str, Tensor],
    folder: RunFolder,
    samples: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Run the rounds of ``folder``'s run over an open fleet; yield each record by its name in ``round_metrics``.

    ``start``: start values of the shared tensors. ``samples``: training images by site, if known.
    """
    from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
    from fedsca_pipeline.federation.server.rounds import Server

    server = Server(
        fleet,
        setup.strategy,
        setup.layout,
        start,
        setup.settings.federation,
        run=folder.fingerprint,
        seed=setup.settings.run.seed,
        folder=CheckpointFolder(folder.server),
        samples=samples,
    )
    for record in server.rounds():
        progress.round_done(record)
        yield {f"{folder.fingerprint}/round_{record.round:05d}": record.as_json()}
