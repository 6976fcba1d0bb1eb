"""Live progress of a run: one bar for all rounds, one per training site, and one permanent line per finished round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsca_pipeline.errors import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedsca_pipeline.federation.fleets.fleet import Fleet
    from fedsca_pipeline.federation.run import RunFolder
    from fedsca_pipeline.federation.server.records import RoundRecord
    from fedsca_pipeline.federation.setup import Setup


class RoundProgress:
    """A context manager that shows a run's progress; its methods are callbacks of the fleet and of the round loop."""

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
        self._training: dict[str, TaskID] = {}
        self._shares: dict[str, float] = {}

    def __enter__(self) -> RoundProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()

    def step(self, site: str, step: int, steps: int, loss: float | None) -> None:
        """Show one local step: ``step`` of ``steps``, counted from 1, and its loss, if known."""
        # A round is one unit and each site an equal share of it, so the remaining time follows the steps.
        self._shares[site] = step / steps
        self._bars.update(self._total, completed=self._done + sum(self._shares.values()) / self._count)
        if site not in self._training:
            self._training[site] = self._bars.add_task(site, total=steps, note="")
        self._bars.update(self._training[site], completed=step, note="" if loss is None else f"loss {loss:.3f}")
        if step == steps:
            self._bars.remove_task(self._training.pop(site))

    def round_done(self, record: RoundRecord) -> None:
        """Show a finished round: mean loss and Dice over the present sites, and the absent sites with their reasons."""
        present = [entry for entry in record.sites.values() if entry.absent is None]
        # A record's Dice belongs to the previous round: to the model that each site had when this round began.
        dice = _mean([entry.dice_validation for entry in present])
        loss = _mean([entry.loss for entry in present])
        self._done = min(record.round, self._rounds)
        self._shares.clear()
        for site in list(self._training):  # sites that failed during the round
            self._bars.remove_task(self._training.pop(site))
        self._bars.update(self._total, completed=self._done, note=f"Dice {dice}")
        traffic = sum(entry.bytes_up for entry in present) / 1e6
        self._bars.console.print(
            f"round {record.round - 1}/{self._rounds}: validation Dice {dice}"
            if record.final
            else f"round {record.round}/{self._rounds}: loss {loss}, Dice of round {record.round - 1} {dice}, "
            f"{len(present)} of {counted(len(record.sites), 'site')}, {traffic:.2f} MB up",
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
    samples: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the server's rounds over an open fleet; yield each round's record by its key in ``round_metrics``.

    ``start``: start values of the shared tensors. ``samples``: number of training images per site, of sites on other
    machines; None: the sites are on this one, and their files are checked before the run goes on.
    """
    from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
    from fedsca_pipeline.federation.server.rounds import Server

    server = Server(
        fleet,
        setup.strategy,
        start,
        setup.settings.federation,
        run=folder.fingerprint,
        seed=setup.settings.run.seed,
        folder=CheckpointFolder(folder.server, folder.fingerprint, folder.sites if samples is None else None),
        samples=samples or {},
    )
    for record in server.rounds():
        progress.round_done(record)
        yield {f"{folder.fingerprint}/round_{record.round:05d}": record.as_json()}
