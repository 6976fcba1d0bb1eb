"""FedNova: updates are compared step for step, whatever the number of local steps.

Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, NeurIPS 2020,
equation 6 with a_i of plain steps. Where all sites do as many steps, it is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedsca_pipeline.federation.strategies.fedavg import FedAvg
from fedsca_pipeline.federation.strategies.kernels import Groups, Replies


class FedNova(FedAvg):
    """FedAvg of updates that are scaled by ``tau_eff / tau_i``, tau_i being a site's steps and tau_eff their mean."""

    name: ClassVar[str] = "fednova"

    def validate(self, replies: Replies, norms: Tensor, earlier: Tensor, max_norm_ratio: float) -> Mapping[str, str]:
        """Reject a number of steps that nothing can be divided by, too."""
        rejected = dict(super().validate(replies, norms, earlier, max_norm_ratio))
        if replies.steps is not None:
            for site, steps in zip(replies.sites, replies.steps.tolist(), strict=True):
                if not 1 <= steps < math.inf:
                    rejected.setdefault(site, f"number of steps {steps:g} is not 1 or more")
        return dict(sorted(rejected.items()))

    def factors(self, replies: Replies, kept: Tensor, n_sites: int, groups: Groups) -> Tensor | None:
        """Return ``tau_eff / tau_i`` of each accepted site, for every group; the mean is the prior's."""
        if replies.steps is None:
            return None
        steps, samples = replies.steps[kept], replies.samples[kept]
        shares = samples / samples.sum() if self.prior == "samples" else samples.new_full(samples.shape, 1 / len(kept))
        return ((shares @ steps) / steps).expand(len(groups), len(kept))
