"""The replies of one round: each is decoded and checked once, and its update stored in the round's memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.messages.codec import TRAVELLING, check, decode, most_bytes
from fedsca_pipeline.federation.messages.manifest import Manifest, MessageKind, WireDtype
from fedsca_pipeline.federation.server.records import SiteRecord
from fedsca_pipeline.federation.strategies.server_step import Replies
from fedsca_pipeline.model.layout import flatten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A message sent to a site; ``base_hash`` is the hash of the base [V] that the site holds once it has decoded it.

    ``answered`` is the last round whose update of this site counts, 0 for none.
    """

    payload: bytes
    base_hash: str
    answered: int


@dataclass
class RoundReplies:
    """The replies of one round, with what each must match.

    A reply is decoded and checked once: by :meth:`fault`, if the fleet calls it when the reply arrives, else by
    :meth:`collect`. Its update goes to the site's row of ``updates`` at once, so that at most one decoded update is in
    memory beside that array. If a site replies more than once, its last reply counts.

    Args:
        round: number of the round, from 1.
        kind: of the expected replies, ``update`` or ``report``.
        run: the run's fingerprint.
        wire_dtype: ``federation.wire_dtype``.
        shapes: of an update's tensors, by name, in the order of the flat vector [V]; empty for reports.
        samples: training images per site, if known beforehand.
        sent: message per site, sorted by site.
        updates: [N, V] fp32, N at least the number of ``sent``.
    """

    round: int
    kind: MessageKind
    run: str
    wire_dtype: WireDtype
    shapes: Mapping[str, tuple[int, ...]]
    samples: Mapping[str, int]
    sent: Mapping[str, Sent]
    updates: Tensor
    accepted: dict[str, Manifest] = field(default_factory=dict)

    def fault(self, site: str, reply: bytes) -> str | None:
        """Return why a reply is rejected; None if it is accepted, and then its update is stored."""
        self.accepted.pop(site, None)
        try:
            message = decode(reply, max_bytes=most_bytes(self.shapes))
            check(
                message,
                kind=self.kind,
                run=self.run,
                round=self.round,
                site=site,
                base_hash=self.sent[site].base_hash,
                answered=self.sent[site].answered,
                shapes=self.shapes,
                dtypes=TRAVELLING[self.wire_dtype],
                samples=self.samples.get(site),
            )
        except MessageError as error:
            return f"rejected: {error}"
        if self.kind == "update":
            self.updates[list(self.sent).index(site)] = flatten(message.tensors, tuple(self.shapes))
        self.accepted[site] = message.manifest
        return None

    def collect(self, replies: dict[str, bytes | Failure]) -> dict[str, SiteRecord]:
        """Return every asked site's record, given what the fleet returned; ``replies`` is emptied on the way.

        Afterwards ``accepted`` is sorted by site, and its updates are the first rows of ``updates``, in the same order.
        """
        arrived, self.accepted = self.accepted, {}
        records: dict[str, SiteRecord] = {}
        for row, (site, sent) in enumerate(self.sent.items()):
            down, reply = len(sent.payload), replies.pop(site, Failure("no answer"))
            if isinstance(reply, Failure):
                records[site] = SiteRecord(bytes_down=down, bytes_up=reply.bytes_up, absent=reply.reason)
                continue
            if site in arrived:
                self.accepted[site] = arrived[site]
            elif fault := self.fault(site, reply):
                logger.warning("round %d: the reply of %s was %s", self.round, site, fault)
                records[site] = SiteRecord(bytes_down=down, bytes_up=len(reply), absent=fault)
                continue
            # Earlier rows are final and this one is read for the last time.
            if self.kind == "update" and row >= len(self.accepted):
                self.updates[len(self.accepted) - 1] = self.updates[row]
            records[site] = _record(self.accepted[site], down, len(reply))
        return records

    def stack(self, bases: Tensor) -> Replies:
        """Return the accepted updates as a strategy receives them; call :meth:`collect` first."""
        manifests = self.accepted.values()
        return Replies(
            round=self.round,
            sites=tuple(self.accepted),
            bases=bases,
            updates=self.updates[: len(self.accepted)],
            samples=torch.tensor([manifest.samples for manifest in manifests], dtype=torch.float64),
            steps=torch.tensor([manifest.metrics.get("steps", math.nan) for manifest in manifests]).double(),
        )


def _record(manifest: Manifest, down: int, up: int) -> SiteRecord:
    metrics, privacy = manifest.metrics, manifest.privacy
    return SiteRecord(
        bytes_down=down,
        bytes_up=up,
        samples=manifest.samples,
        loss=metrics.get("loss"),
        dice_validation=metrics.get("dice_validation"),
        dice_local=metrics.get("dice_local"),
        seconds=metrics.get("seconds"),
        epsilon=privacy.epsilon if privacy else None,
        noise_multiplier=privacy.noise_multiplier if privacy else None,
        privacy_level=privacy.level if privacy else None,
    )
