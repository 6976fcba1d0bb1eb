"""A round with frozen weights in bf16 answers as one that leaves the casts to autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site import prefix, steps
from fedsca_pipeline.federation.site.steps import ignore_step
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.model import inference
from fedsca_pipeline.model.half import HalfWeights
from fedsca_pipeline.model.layout import hash_tensors


def payload(worker: LocalWorker) -> bytes:
    tensors = {name: worker.initial[name] for name in worker.shapes}
    return encode(Manifest("aggregate", "run", 1, "a", hash_tensors(tensors), 0, "fp32", False, {}, 0), tensors)


def test_a_round_gives_the_same_bits_and_leaves_the_model_in_fp32(
    make_worker, make_site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (prefix, steps, inference):
        monkeypatch.setattr(module, "autocast", lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    data, answers = make_site("a"), []

    for dtype in (None, torch.bfloat16):
        worker = make_worker(batch_size=2)
        worker._half = HalfWeights(worker.model, set(worker.parameters), dtype)
        store = SiteStore(tmp_path / str(dtype) / "a", "run")
        answers.append(decode(worker.work(payload(worker), 1, "a", data, store, ignore_step)))
        assert all(parameter.dtype == torch.float32 for parameter in worker.model.parameters())

    cast, half = answers
    assert all(torch.equal(cast.tensors[name], half.tensors[name]) for name in cast.tensors)
    assert all(half.manifest.metrics[key] == value for key, value in cast.manifest.metrics.items() if key != "seconds")


def test_on_the_cpu_a_worker_has_no_copies(make_worker) -> None:
    worker = make_worker()

    with worker._half.in_use():
        assert all(parameter.dtype == torch.float32 for parameter in worker.model.parameters())
