"""FedNova: updates are normalised by their number of local steps.

Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, NeurIPS 2020,
equation 6 with the a_i of plain steps. If all sites do the same number of steps, it is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedsca_pipeline.federation.strategies.base import Replies
from fedsca_pipeline.federation.strategies.fedavg import FedAvg


class FedNova(FedAvg):
    """FedAvg of updates scaled by ``tau_eff / tau_i``; tau_i is a site's number of steps and tau_eff their mean."""

    name: ClassVar[str] = "fednova"

    def validate(self, replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> Mapping[str, str]:
        """Reject also a number of steps below 1 or not finite."""
        rejected = dict(super().validate(replies, norms, earlier, max_norm_ratio))
        if replies.steps is not None:
            for site, steps in zip(replies.sites, replies.steps.tolist(), strict=True):
                if not 1 <= steps < math.inf:
                    rejected.setdefault(site, f"number of steps {steps:g} is not 1 or more")
        return dict(sorted(rejected.items()))

    def scales(self, replies: Replies, rows: Tensor, n_sites: int, prior: Tensor) -> Tensor | None:
        """Return ``tau_eff / tau_i`` of each accepted site, the same in every group; the prior weights the mean."""
        if replies.steps is None:
            return None
        steps = replies.steps[rows]
        return ((prior @ steps) / steps).expand(len(self.groups()), len(rows))
