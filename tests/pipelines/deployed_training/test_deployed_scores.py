"""What deployed sites score, and what the coordinator's tables make of their means, is what a run in process gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from fedsca_pipeline.config import Settings
from fedsca_pipeline.flower.config import FlowerConfig, read_site_config
from fedsca_pipeline.flower.coordinator import superlink
from fedsca_pipeline.flower.coordinator.fleet import Node, Reply
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.flower.messages.contents import answer_content
from fedsca_pipeline.flower.site.worker import SiteWork
from fedsca_pipeline.model.foundation import prepare_foundation
from fedsca_pipeline.pipelines.deployed_training import nodes
from fedsca_pipeline.pipelines.evaluation import nodes as evaluation
from fedsca_pipeline.pipelines.federated_training import nodes as training

SITES = ("images", "one_class", "two_classes")
VOLUMES = ("one_class", "two_classes")
GIVEN = {
    "foundation": {"name": "random"},
    "preprocessing": {"image_size": 32, "classes": 2, "split": {"validation": 1, "test": 2}},
    "adapters": {"width": 4},
    "run": {"threads": 1},
    "federation": {"rounds": 2, "quorum": 3, "strategy": "fedsca"},
    "evaluation": {"surface_tolerance": 3.0},
}


@dataclass
class LinkToWorkers:
    """Carries each message to a site's worker in this process, whose answer is there at once."""

    works: Mapping[str, SiteWork]
    replies: dict[str, Reply] = field(default_factory=dict)

    def nodes(self) -> Mapping[str, Node]:
        return {site: Node(site) for site in self.works}

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str:
        id_ = str(len(self.replies))
        answer = self.works[node].answer(task["kind"], task["round"], payload)
        answer_content(task["kind"], answer, 2**20)
        self.replies[id_] = Reply(id_, node, answer)
        return id_

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        return [self.replies[id_] for id_ in ids]

    def reconnect(self) -> None:
        raise AssertionError("it never breaks")


@dataclass
class Deployed:
    """A deployed run: its sites' workers, and what the coordinator's nodes returned."""

    works: Mapping[str, SiteWork]
    settings: Settings
    description: Mapping[str, Any]
    rounds: Mapping[str, Callable[[], Any]]
    index: Mapping[str, Any]
    scores: Mapping[str, Any]
    root: Path


def write_images(folder: Path) -> None:
    """Ten plain images, whose bright squares are of the second class."""
    draw = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(10):
        image, mask = draw.integers(0, 120, (32, 32), dtype=np.uint8), np.zeros((32, 32), np.uint8)
        mask[4 : 10 + number, 6:20] = 2
        Image.fromarray(np.where(mask > 0, 220, image).astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray(mask).save(folder / f"masks/{number}.png")


def split_classes(masks: Path) -> None:
    """Give one half of every volume's foreground to the second class."""
    for path in masks.iterdir():
        mask = nibabel.load(path)
        labels = np.asanyarray(mask.dataobj).copy()
        labels[labels.shape[0] // 2 :] *= 2
        nibabel.save(nibabel.Nifti1Image(labels, mask.affine), path)


@pytest.fixture(scope="module")
def works(tmp_path_factory, write_volume_site) -> dict[str, SiteWork]:
    found = {}
    for seed, site in enumerate(SITES):
        folder = tmp_path_factory.mktemp(site)
        for name in ("ca.crt", "site.key"):
            (folder / name).touch()
        values = {"site": site, "data": "data", "work": "work", "coordinator": "c:1"}
        values["certificates"] = {"authority": "ca.crt", "key": "site.key"}
        (folder / "site.yml").write_text(yaml.safe_dump(values))
        if site in VOLUMES:
            write_volume_site(folder / "data", seed=seed)
        found[site] = SiteWork(read_site_config(folder / "site.yml"))
    write_images(found["images"].config.data)
    split_classes(found["two_classes"].config.data / "masks")
    return found


def rounds_of(chunks: Iterator[Mapping[str, Any]]) -> dict[str, Callable[[], Any]]:
    return {key: lambda value=value: value for chunk in chunks for key, value in chunk.items()}


@pytest.fixture(scope="module")
def deployed(works, tmp_path_factory) -> Deployed:
    root = tmp_path_factory.mktemp("coordinator")
    settings = Settings(**GIVEN, strategies={"fedsca": {}})
    provenance = {"sha256": prepare_foundation(settings.foundation, root / "foundations").sha256}
    flower = FlowerConfig(sites=list(SITES), authority=root / "ca.crt", home=root / "home", poll=0.01)
    places = (root / "foundations", root / "checkpoints")

    @contextmanager
    def opened(_config: FlowerConfig) -> Iterator[LinkToWorkers]:
        yield LinkToWorkers(works)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superlink, "open_link", opened)
        joined = nodes.join(settings, provenance, False, flower, *places)
        description = nodes.describe(settings, provenance, joined)
        rounds = rounds_of(nodes.train(settings, description, joined, False, flower, *places))
        index, scores = nodes.finish(settings, description, rounds, flower, *places, root / "models")
    return Deployed(works, settings, description, rounds, index, scores, root)


@dataclass
class InProcess:
    """The tables of the same run in process."""

    images: tuple[Any, ...]
    volumes: tuple[Any, ...]
    predictions: Path


@pytest.fixture(scope="module")
def in_process(deployed: Deployed, tmp_path_factory) -> InProcess:
    root = tmp_path_factory.mktemp("in_process")
    places = [work.folder for work in deployed.works.values()]
    manifests = [place.load_manifest() for place in places]
    raw = root / "raw"
    raw.mkdir()
    for site, work in deployed.works.items():
        (raw / site).symlink_to(work.config.data)
    description = dict(deployed.description)
    settings = Settings(**GIVEN, strategies={"fedsca": {}})
    rounds = rounds_of(
        training.train(
            settings, description, False, root / "foundations", root / "checkpoints", root / "private",
            *(part for place, manifest in zip(places, manifests, strict=True) for part in (manifest, place.arrays)),
        )
    )  # fmt: skip
    index = training.export_site_models(
        settings, description, rounds, root / "foundations", root / "checkpoints", root / "models", *manifests
    )
    here = (settings, index, root / "foundations", root / "models")
    images = [
        evaluation.score_site(*here, manifest, place.arrays) for place, manifest in zip(places, manifests, strict=True)
    ]
    volumes = [
        evaluation.score_volumes(*here, raw, root / "predictions", manifest, place.arrays)
        for place, manifest in zip(places, manifests, strict=True)
        if place.site in VOLUMES
    ]
    return InProcess(
        evaluation.tabulate(settings, description, rounds, index, *images),
        evaluation.tabulate_volumes(settings, *volumes),
        root / "predictions",
    )


def test_the_tables_of_sites_and_classes_are_those_of_a_run_in_process(deployed, in_process) -> None:
    sites, final, metrics = nodes.tabulate(
        deployed.settings, dict(deployed.description), deployed.rounds, deployed.index, deployed.scores
    )

    _, expected_sites, expected_final, expected_metrics = in_process.images
    pd.testing.assert_frame_equal(sites, expected_sites, check_exact=True)
    # A message holds how many seconds it took, and the size of a compressed one depends on that.
    taken = ["bytes up", "bytes down"]
    pd.testing.assert_frame_equal(final.drop(columns=taken), expected_final.drop(columns=taken), check_exact=True)
    assert metrics.keys() == expected_metrics.keys()
    assert {"mean over classes", "class 1", "class 2"} == set(sites["class"])
    assert "not at images" in " ".join(sites["note"])


def test_the_tables_by_volume_in_mm_are_those_of_a_run_in_process(deployed, in_process) -> None:
    sites, metrics = nodes.tabulate_volumes(deployed.settings, deployed.scores)

    _, expected_sites, expected_metrics = in_process.volumes
    pd.testing.assert_frame_equal(sites, expected_sites, check_exact=True)
    assert metrics == expected_metrics
    assert set(metrics) == {*VOLUMES, "mean over sites"}
    assert metrics["two_classes"]["volumes"] == 2


def test_predictions_are_written_at_the_site_and_there_only(deployed, in_process) -> None:
    for site in VOLUMES:
        own = sorted((deployed.works[site].folder.predictions / site).iterdir())
        assert [path.name for path in own] == [path.name for path in sorted((in_process.predictions / site).iterdir())]
        for path in own:
            there = nibabel.load(in_process.predictions / site / path.name)
            np.testing.assert_array_equal(nibabel.load(path).get_fdata(), there.get_fdata())
        assert deployed.works[site].folder.volume_scores.is_file()
    assert not deployed.works["images"].folder.predictions.exists()
    assert not list(deployed.root.rglob("*.nii.gz"))


def test_of_scores_only_means_and_counts_leave_a_site(deployed) -> None:
    said = documents.Scores.model_validate(deployed.scores["two_classes"])
    text = said.model_dump_json()

    assert not [name for name in deployed.works["two_classes"].folder.load_manifest()["volume"] if name in text]
    assert {(row.model, row.label) for row in said.volumes} == {
        (model, label) for model in ("before", "after", "chosen") for label in range(3)
    }
    assert {row.label for row in documents.Scores.model_validate(deployed.scores["one_class"]).volumes} == {0, 1}
    assert documents.Scores.model_validate(deployed.scores["images"]).volumes == []


def test_without_volumes_their_tables_are_empty(deployed) -> None:
    scores = {"images": deployed.scores["images"]}

    sites, metrics = nodes.tabulate_volumes(deployed.settings, scores)

    assert sites.empty
    assert metrics == {}
