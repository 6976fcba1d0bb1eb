"""The round loop: distribute, train at the sites, collect, aggregate. It knows the sites by the fleet protocol only."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.compute import stream_seed
from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.errors import NoValidSite
from fedsca_pipeline.federation.fleets.fleet import Fleet
from fedsca_pipeline.federation.messages.codec import as_decoded, encode
from fedsca_pipeline.federation.messages.manifest import Manifest, MessageKind
from fedsca_pipeline.federation.server.arrays import RoundMemory
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder
from fedsca_pipeline.federation.server.records import Matrices, RoundRecord, SiteRecord
from fedsca_pipeline.federation.server.replies import RoundReplies, Sent
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.server_step import Aggregation, ServerState, SiteLimits
from fedsca_pipeline.model.layout import flatten, hash_tensors, unflatten

logger = logging.getLogger(__name__)


class Server:
    """The coordinator of one run: strategy, state and what each site is known to hold.

    Args:
        fleet: reaches the sites.
        strategy: the federated method.
        initial: start values of the model's trainable tensors, by name, fp32.
        config: the ``federation`` parameters.
        run: the run's fingerprint, part of every message.
        seed: of the participation draw.
        folder: of the run's checkpoints.
        samples: training images per site; a site that is missing here states its own number, once: its first accepted
            reply counts for the whole run.
    """

    def __init__(
        self,
        fleet: Fleet,
        strategy: Strategy,
        initial: Mapping[str, Tensor],
        config: FederationConfig,
        *,
        run: str,
        seed: int,
        folder: CheckpointFolder,
        samples: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.fleet, self.strategy, self.config = fleet, strategy, config
        self.run, self.seed, self.folder, self.samples = run, seed, folder, samples
        self.limits = SiteLimits(config.max_norm_ratio, config.max_share, config.clip_to_median)
        self.sites = tuple(fleet.sites())
        self.shapes = strategy.wire_shapes()
        self.names = tuple(self.shapes)
        extra = {name: torch.zeros(shape) for name, shape in strategy.extra_shapes().items()}
        self.initial = flatten({**initial, **extra}, self.names)
        self.memory = RoundMemory.within(config.server_memory, folder.folder, len(self.sites), self.initial.numel())

    def rounds(self) -> Iterator[RoundRecord]:
        """Run the rounds that are left and yield every round's record, first those of an earlier attempt.

        A damaged checkpoint or state of an earlier attempt is set aside, and the run goes on after the round before.
        A round's checkpoint is on disk before its record is yielded. After the last round the sites validate once more:
        the record of round ``rounds + 1`` is ``final`` and holds the Dice of the last round's models.

        Raises:
            NoValidSite: a round got fewer valid replies than ``federation.quorum``; the previous round's checkpoint is
                unchanged, and the same command resumes from it.
            ResumeError: so many files of the earlier attempt are damaged that no checkpoint can be continued.
        """
        checkpoint = self.folder.resume() or self._start()
        yield from self.folder.records(checkpoint.round)
        while checkpoint.round < self.config.rounds:
            checkpoint, record = self._train_round(checkpoint)
            checkpoint = self.folder.save(checkpoint, record)
            yield record
        if checkpoint.round == self.config.rounds:
            checkpoint, record = self._final_round(checkpoint)
            self.folder.save(checkpoint, record)
            yield record

    def participants(self, round_: int) -> tuple[str, ...]:
        """Return the sites drawn for a round, sorted; ``federation.participation`` sets their number."""
        count = self.config.drawn(len(self.sites))
        draw = np.random.default_rng(stream_seed(self.seed, "participation", round_))
        return tuple(sorted(draw.choice(self.sites, size=count, replace=False).tolist()))

    def _start(self) -> Checkpoint:
        count, values = len(self.sites), self.initial.numel()
        return Checkpoint(
            round=0,
            state=ServerState.initial(count, values, len(self.strategy.groups())),
            aggregates=self.initial.expand(count, values),
            bases=torch.zeros(1, values).expand(count, values),
            has_base=torch.zeros(count, dtype=torch.bool),
            answered=torch.zeros(count, dtype=torch.int64),
        )

    def _train_round(self, checkpoint: Checkpoint) -> tuple[Checkpoint, RoundRecord]:
        round_ = checkpoint.round + 1
        sent = self._distribute(checkpoint, round_, self.participants(round_), kind="aggregate")
        replies, records = self._exchange(round_, sent, kind="update", state=checkpoint.state)
        for index, site in enumerate(self.sites):
            if site not in sent:
                self.memory.bases[index] = checkpoint.bases[index]
        if len(replies.accepted) < self.config.quorum:
            raise NoValidSite(_too_few(round_, len(replies.accepted), self.config.quorum, records))
        state, aggregation = self.strategy.aggregate(
            checkpoint.state,
            replies.stack(self.memory.bases),
            sites=self.sites,
            initial=self.initial,
            limits=self.limits,
            out=self.memory.results,
        )
        if len(aggregation.accepted) < self.config.quorum:
            records = _with_aggregation(records, aggregation)
            raise NoValidSite(_too_few(round_, len(aggregation.accepted), self.config.quorum, records))
        for site, reason in aggregation.rejected.items():
            logger.warning("round %d: the update of %s was rejected: %s", round_, site, reason)
        record = RoundRecord(
            round=round_,
            final=False,
            sites=_with_aggregation(records, aggregation),
            accepted=aggregation.accepted,
            similarity=Matrices.of(aggregation.similarity),
            weights=Matrices.of(aggregation.weights),
        )
        # A site whose update was not accepted resumes from its last accepted one; the base it holds is unknown.
        asked = torch.tensor([site in sent for site in self.sites])
        accepted = torch.tensor([site in aggregation.accepted for site in self.sites])
        after = Checkpoint(
            round=round_,
            state=state,
            aggregates=aggregation.aggregates,
            bases=self.memory.bases,
            has_base=torch.where(asked, accepted, checkpoint.has_base),
            answered=checkpoint.answered.where(~accepted, round_),
        )
        return after, record

    def _final_round(self, checkpoint: Checkpoint) -> tuple[Checkpoint, RoundRecord]:
        round_ = checkpoint.round + 1
        sent = self._distribute(checkpoint, round_, self.sites, kind="final")
        replies, records = self._exchange(round_, sent, kind="report", state=checkpoint.state)
        if not replies.accepted:
            raise NoValidSite(_too_few(round_, 0, 1, records))
        return replace(checkpoint, round=round_), RoundRecord(round=round_, final=True, sites=records)

    def _distribute(
        self, checkpoint: Checkpoint, round_: int, sites: Sequence[str], kind: MessageKind
    ) -> dict[str, Sent]:
        return {site: self._message(checkpoint, round_, site, kind) for site in sites}

    def _message(self, checkpoint: Checkpoint, round_: int, site: str, kind: MessageKind) -> Sent:
        """Return a site's message, and store the base that the site will hold once it has decoded it.

        With int8 a site with a known base gets the difference from it. The next difference includes this one's rounding
        error.
        """
        index = self.sites.index(site)
        aggregate, known, base = (
            array[index] for array in (checkpoint.aggregates, checkpoint.bases, self.memory.bases)
        )
        relative = self.config.wire_dtype == "int8" and bool(checkpoint.has_base[index]) and bool(self.names)
        dtype = self.config.wire_dtype if relative or self.config.wire_dtype != "int8" else "fp16"
        tensors = unflatten(aggregate - known if relative else aggregate, self.names, self.shapes)
        decoded = flatten(as_decoded(tensors, dtype), self.names)
        base.copy_(known + decoded if relative else decoded)
        manifest = Manifest(
            kind=kind,
            run=self.run,
            round=round_,
            site=site,
            base_hash=self._hash(known if relative else base),
            samples=0,
            dtype=dtype,
            relative=relative,
            answered=int(checkpoint.answered[index]),
        )
        return Sent(encode(manifest, tensors, self.config.compression), self._hash(base), manifest.answered)

    def _exchange(
        self, round_: int, sent: Mapping[str, Sent], kind: MessageKind, state: ServerState
    ) -> tuple[RoundReplies, dict[str, SiteRecord]]:
        """Send the messages, and return the replies and every site's record; ``state`` is that before the round."""
        counts = zip(self.sites, state.samples.tolist(), state.trained.tolist(), strict=True)
        claimed = {site: int(count) for site, count, trained in counts if trained}
        replies = RoundReplies(
            round=round_,
            kind=kind,
            run=self.run,
            wire_dtype=self.config.wire_dtype,
            shapes=self.shapes if kind == "update" else {},
            samples={**self.samples, **claimed},
            sent=sent,
            updates=self.memory.updates,
        )
        returned = self.fleet.exchange(
            round_,
            {site: message.payload for site, message in sent.items()},
            deadline=self.config.deadline,
            quorum=self.config.quorum,
            grace=math.inf if self.config.grace is None else self.config.grace,
            fault=replies.fault,
        )
        asked = replies.collect(dict(returned))
        return replies, {site: asked.get(site, SiteRecord(absent="not drawn this round")) for site in self.sites}

    def _hash(self, vector: Tensor) -> str:
        return hash_tensors(unflatten(vector, self.names, self.shapes))


def _with_aggregation(records: Mapping[str, SiteRecord], aggregation: Aggregation) -> dict[str, SiteRecord]:
    """Return the records with each accepted site's update norm, mean self weight over groups and spread.

    A rejected site's record says why.
    """
    self_weights = aggregation.weights.diagonal(dim1=1, dim2=2).mean(dim=0) if len(aggregation.weights) else None
    completed = dict(records)
    for index, site in enumerate(aggregation.accepted):
        completed[site] = replace(
            completed[site],
            update_norm=float(aggregation.norms[index]),
            self_weight=1.0 if self_weights is None else float(self_weights[index]),
            spread=float(aggregation.spread[index]),
        )
    for site, reason in aggregation.rejected.items():
        completed[site] = replace(completed[site], absent=f"rejected: {reason}")
    return completed


def _too_few(round_: int, valid: int, quorum: int, records: Mapping[str, SiteRecord]) -> str:
    reasons = "; ".join(f"{site}: {record.absent}" for site, record in records.items() if record.absent)
    return (
        f"round {round_}: {valid} valid replies, federation.quorum asks for {quorum} ({reasons}). "
        "Nothing was overwritten; fix the sites, or lower federation.quorum, and run the command again to resume from "
        "the previous round."
    )
