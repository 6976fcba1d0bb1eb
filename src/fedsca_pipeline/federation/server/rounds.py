"""The round loop: distribute, train locally, collect, aggregate; written once, against the fleet protocol."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.compute import stream_seed
from fedsca_pipeline.config import FederationConfig
from fedsca_pipeline.errors import MessageError, NoValidSite
from fedsca_pipeline.federation.fleets.fleet import Failure, Fleet
from fedsca_pipeline.federation.messages.codec import (
    TRAVELLING,
    Manifest,
    Message,
    as_decoded,
    check,
    decode,
    encode,
    most_bytes,
)
from fedsca_pipeline.federation.server.arrays import RoundMemory
from fedsca_pipeline.federation.server.checkpoint import Checkpoint, CheckpointFolder, RoundRecord, SiteRecord
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.server_step import Aggregation, Replies, ServerState
from fedsca_pipeline.model.layout import TensorLayout, flatten, hash_tensors, unflatten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A message on its way to a site, the hash of the base [V] it will hold once decoded, and whence it goes on."""

    payload: bytes
    base_hash: str
    answered: int


class Server:
    """The coordinator of one run: strategy, state and what each site is known to hold.

    Args:
        fleet: reaches the sites.
        strategy: answers the four questions of docs/architecture.md.
        layout: the model's trainable tensors.
        initial: their start values, by name, fp32.
        config: the ``federation`` parameters.
        run: the run's fingerprint, part of every message.
        seed: of the participation draw.
        folder: where checkpoints go.
        samples: training images of each site, where they are known before it sends an update.
    """

    def __init__(
        self,
        fleet: Fleet,
        strategy: Strategy,
        layout: TensorLayout,
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
        self.layout = layout
        self.sites = tuple(fleet.sites())
        self.shapes = strategy.wire_shapes()
        self.names = tuple(self.shapes)
        extra = {name: torch.zeros(shape) for name, shape in strategy.extra_shapes().items()}
        self.initial = flatten({**initial, **extra}, self.names)
        self.memory = RoundMemory.within(config.server_memory, folder.folder, len(self.sites), self.initial.numel())

    def rounds(self) -> Iterator[RoundRecord]:
        """Run what is left of the run, yielding every round's record, those of an earlier attempt first.

        A checkpoint is on disk before its record is yielded. After the last round the sites validate once more: the
        record of round ``rounds + 1`` is ``final`` and holds the Dice of the last round's models.

        Raises:
            NoValidSite: a round got fewer valid replies than ``federation.quorum``; the checkpoint of the round before
                stands, and the same command goes on from it.
        """
        checkpoint = self.folder.latest() or self._start()
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
        """Draw the sites of a round, sorted: as many as ``federation.participation`` says."""
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
        replies, records = self._collect(round_, sent, kind="update")
        for index, site in enumerate(self.sites):
            if site not in sent:
                self.memory.bases[index] = checkpoint.bases[index]
        if len(replies) < self.config.quorum:
            raise NoValidSite(_too_few(round_, len(replies), self.config.quorum, records))
        state, aggregation = self.strategy.aggregate(
            checkpoint.state,
            self._stack(round_, replies),
            sites=self.sites,
            initial=self.initial,
            max_norm_ratio=self.config.max_norm_ratio,
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
            similarity=aggregation.similarity.tolist(),
            weights=aggregation.weights.tolist(),
        )
        # Of a site whose update does not count nothing is known any more, and it goes on from its last one that does.
        asked = torch.tensor([site in sent for site in self.sites])
        counts = torch.tensor([site in aggregation.accepted for site in self.sites])
        after = Checkpoint(
            round=round_,
            state=state,
            aggregates=aggregation.aggregates,
            bases=self.memory.bases,
            has_base=torch.where(asked, counts, checkpoint.has_base),
            answered=checkpoint.answered.where(~counts, round_),
        )
        return after, record

    def _final_round(self, checkpoint: Checkpoint) -> tuple[Checkpoint, RoundRecord]:
        round_ = checkpoint.round + 1
        sent = self._distribute(checkpoint, round_, self.sites, kind="final")
        replies, records = self._collect(round_, sent, kind="report")
        if not replies:
            raise NoValidSite(_too_few(round_, 0, 1, records))
        return replace(checkpoint, round=round_), RoundRecord(round=round_, final=True, sites=records)

    def _distribute(self, checkpoint: Checkpoint, round_: int, sites: Sequence[str], kind: str) -> dict[str, Sent]:
        return {site: self._message(checkpoint, round_, site, kind) for site in sites}

    def _message(self, checkpoint: Checkpoint, round_: int, site: str, kind: str) -> Sent:
        """With int8 a known base makes the aggregate a difference from it; its rounding error is in the next one."""
        index = self.sites.index(site)
        aggregate, known, base = (
            array[index] for array in (checkpoint.aggregates, checkpoint.bases, self.memory.bases)
        )
        relative = self.config.wire_dtype == "int8" and bool(checkpoint.has_base[index]) and bool(self.names)
        dtype = self.config.wire_dtype if relative or self.config.wire_dtype != "int8" else "fp16"
        tensors = unflatten(aggregate - known if relative else aggregate, self.names, self.shapes)
        heard = flatten(as_decoded(tensors, dtype), self.names)
        base.copy_(known + heard if relative else heard)
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

    def _collect(
        self, round_: int, sent: Mapping[str, Sent], kind: str
    ) -> tuple[dict[str, Manifest], dict[str, SiteRecord]]:
        """Return what the usable replies say, sorted by site, and every site's record.

        Their updates are in the first rows of the round's memory, in the same order.
        """

        def fault(site: str, answer: bytes) -> str | None:
            try:
                self._checked(answer, round_, site, sent[site], kind)
            except MessageError as error:
                return f"rejected: {error}"
            return None

        payloads = {site: message.payload for site, message in sent.items()}
        answers = dict(
            self.fleet.exchange(
                round_,
                payloads,
                deadline=self.config.deadline,
                quorum=self.config.quorum,
                grace=math.inf if self.config.grace is None else self.config.grace,
                fault=fault,
            )
        )
        replies: dict[str, Manifest] = {}
        records = {site: SiteRecord(absent="not drawn this round") for site in self.sites if site not in sent}
        for site, message in sent.items():
            down = len(message.payload)
            answer = answers.pop(site, Failure("no answer"))
            if isinstance(answer, Failure):
                records[site] = SiteRecord(bytes_down=down, bytes_up=answer.bytes_up, absent=answer.reason)
                continue
            try:
                reply = self._checked(answer, round_, site, message, kind)
            except MessageError as error:
                logger.warning("round %d: the reply of %s was rejected: %s", round_, site, error)
                records[site] = SiteRecord(bytes_down=down, bytes_up=len(answer), absent=f"rejected: {error}")
                continue
            if kind == "update":
                self.memory.updates[len(replies)] = flatten(reply.tensors, self.names)
            replies[site] = reply.manifest
            metrics, privacy = reply.manifest.metrics, reply.manifest.privacy
            records[site] = SiteRecord(
                bytes_down=down,
                bytes_up=len(answer),
                samples=reply.manifest.samples,
                loss=metrics.get("loss"),
                dice_validation=metrics.get("dice_validation"),
                dice_local=metrics.get("dice_local"),
                seconds=metrics.get("seconds"),
                epsilon=privacy and privacy.epsilon,
                noise_multiplier=privacy and privacy.noise_multiplier,
                privacy_level=privacy and privacy.level,
            )
        return replies, {site: records[site] for site in self.sites}

    def _checked(self, answer: bytes, round_: int, site: str, sent: Sent, kind: str) -> Message:
        shapes = self.shapes if kind == "update" else {}
        reply = decode(answer, max_bytes=most_bytes(shapes))
        check(
            reply,
            kind=kind,
            run=self.run,
            round=round_,
            site=site,
            base_hash=sent.base_hash,
            answered=sent.answered,
            shapes=shapes,
            dtypes=TRAVELLING[self.config.wire_dtype],
            samples=self.samples.get(site),
        )
        return reply

    def _stack(self, round_: int, replies: Mapping[str, Manifest]) -> Replies:
        return Replies(
            round=round_,
            sites=tuple(replies),
            bases=self.memory.bases,
            updates=self.memory.updates[: len(replies)],
            samples=torch.tensor([manifest.samples for manifest in replies.values()], dtype=torch.float64),
            steps=torch.tensor([manifest.metrics.get("steps", math.nan) for manifest in replies.values()]).double(),
        )

    def _hash(self, vector: Tensor) -> str:
        return hash_tensors(unflatten(vector, self.names, self.shapes))


def _with_aggregation(records: Mapping[str, SiteRecord], aggregation: Aggregation) -> dict[str, SiteRecord]:
    """Add each accepted site's update norm, mean self weight over groups and spread; say why others were rejected."""
    self_weights = aggregation.weights.diagonal(dim1=1, dim2=2).mean(dim=0) if len(aggregation.weights) else None
    found = dict(records)
    for index, site in enumerate(aggregation.accepted):
        found[site] = replace(
            found[site],
            update_norm=float(aggregation.norms[index]),
            self_weight=1.0 if self_weights is None else float(self_weights[index]),
            spread=float(aggregation.spread[index]),
        )
    for site, reason in aggregation.rejected.items():
        found[site] = replace(found[site], absent=f"rejected: {reason}")
    return found


def _too_few(round_: int, valid: int, quorum: int, records: Mapping[str, SiteRecord]) -> str:
    reasons = "; ".join(f"{site}: {record.absent}" for site, record in records.items() if record.absent)
    return (
        f"round {round_}: {valid} valid replies, federation.quorum asks for {quorum} ({reasons}). "
        "Nothing was overwritten; mend the sites, or lower federation.quorum, and run the command again to go on from "
        "the round before."
    )
