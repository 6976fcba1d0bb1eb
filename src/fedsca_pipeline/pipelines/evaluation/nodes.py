"""Nodes of evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import EvaluationConfig, FoundationConfig, PreprocessingConfig, RunConfig

if TYPE_CHECKING:
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.model.foundation.model import SegmentationModel
    from fedsca_pipeline.model.in_turn import ModelsInTurn


def score_site(
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    evaluation: EvaluationConfig,
    site_models: dict[str, Any],
    foundations: Path,
    models: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Score one site's test images with the foundation (``before``), its last model (``after``) and the chosen one.

    A site that never answered has no model, and only its ``before``.
    """
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.in_turn import ModelsInTurn

    with deterministic(run, resolve_threads(run.threads)) as device:
        in_turn = ModelsInTurn.load(foundation, foundations, preprocessing, device)
        return score_images(in_turn, preprocessing, evaluation, site_models, models, manifest, arrays)


def score_images(
    in_turn: ModelsInTurn,
    preprocessing: PreprocessingConfig,
    evaluation: EvaluationConfig,
    site_models: Mapping[str, Any],
    models: Path,
    manifest: pd.DataFrame,
    arrays: Path,
) -> pd.DataFrame:
    """Score one site's test images on the network of ``in_turn``; as ``score_site``."""
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.evaluation.tables import image_table

    site = str(manifest["site"].iloc[0])
    data, kept = SiteArrays(arrays, manifest), site_models["sites"][site]
    tables: dict[str, pd.DataFrame] = {}
    for model, snapshot in SNAPSHOTS.items():
        if snapshot not in kept and model != "before":
            continue
        if model == "chosen" and "after" in tables and kept["best"]["round"] == kept["last"]["round"]:
            tables[model] = tables["after"].assign(model=model)
            continue
        with reported(in_turn, model, models / site) as network:
            scores = _score(network, data, preprocessing.classes, evaluation)
        tables[model] = image_table(site, data.names("test"), scores, model)
    return pd.concat(tables.values(), ignore_index=True)


def draw_overlays(
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    evaluation: EvaluationConfig,
    scores: Any,
    foundations: Path,
    models: Path,
    manifest: Any,
    arrays: Path,
) -> Any:
    """Draw the best, median and worst test image of one site, as the chosen model (or the foundation) segments them."""
    import torch

    from fedsca_pipeline.model.in_turn import ModelsInTurn

    in_turn = ModelsInTurn.load(foundation, foundations, preprocessing, torch.device("cpu"))
    return draw_examples(in_turn, preprocessing, evaluation, scores, models, manifest, arrays)


def draw_examples(
    in_turn: ModelsInTurn,
    preprocessing: PreprocessingConfig,
    evaluation: EvaluationConfig,
    scores: pd.DataFrame,
    models: Path,
    manifest: pd.DataFrame,
    arrays: Path,
) -> Any:
    """Draw test images as the network of ``in_turn`` segments them; as ``draw_overlays``."""
    from fedsca_pipeline.data.arrays import SiteArrays, scored_classes
    from fedsca_pipeline.evaluation.figures import choose_examples, overlays

    data = SiteArrays(arrays, manifest)
    model = "chosen" if "chosen" in set(scores["model"]) else "before"
    scored = scores[scores["model"] == model]
    with reported(in_turn, model, models / str(manifest["site"].iloc[0])) as network:
        examples = [
            _example(label, name, scored, data, network, preprocessing.classes, evaluation)
            for label, name in choose_examples(scored).items()
        ]
    return overlays(examples, preprocessing.class_names, scored_classes(data, preprocessing.classes))


def tabulate(
    preprocessing: PreprocessingConfig,
    description: dict[str, Any],
    round_metrics: Mapping[str, Any],
    site_models: Mapping[str, Any],
    *scores: Any,
) -> tuple[Any, Any, Any, Any]:
    """Gather the sites' scores: per image, per site, the final table, and that as ``{site: {column: value}}``."""
    import json

    import pandas as pd

    from fedsca_pipeline.evaluation.tables import final_table, site_table

    images = pd.concat(scores, ignore_index=True)
    sites = site_table(images, preprocessing.names)
    final = final_table(sites, traffic_of(records_of(description, round_metrics), site_models))
    return images, sites, final, json.loads(final.set_index("site").to_json(orient="index"))


def traffic_of(records: Sequence[Any], site_models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what crossed the wire, the chosen round and the privacy spent, by site, as ``final_table`` asks for it."""
    # Of a model trained on pooled data no site has a record.
    return {
        site: {
            "bytes_up": sum(r.sites[site].bytes_up for r in records if site in r.sites),
            "bytes_down": sum(r.sites[site].bytes_down for r in records if site in r.sites),
            "best_round": kept.get("best", {}).get("round"),
            **_privacy_spent([r.sites[site] for r in records if site in r.sites]),
        }
        for site, kept in site_models["sites"].items()
    }


def _privacy_spent(entries: Sequence[Any]) -> dict[str, Any]:
    """Return the last epsilon that a site told of, and its level; nothing where there is no differential privacy."""
    told = [entry for entry in entries if entry.epsilon is not None]
    return {"epsilon": told[-1].epsilon, "privacy": told[-1].privacy_level} if told else {}


def draw_curves(description: dict[str, Any], round_metrics: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Draw learning curves, and the weights of every round as an interactive and a still heat map."""
    import pandas as pd

    from fedsca_pipeline.evaluation.figures import learning_curves, weight_heatmap, weight_heatmap_image

    records = records_of(description, round_metrics)
    weights = {
        record.round: pd.DataFrame(_mean_over_groups(record.weights), index=record.accepted, columns=record.accepted)
        for record in records
        if record.weights
    }
    return learning_curves(history_table(records)), weight_heatmap(weights), weight_heatmap_image(weights)


def records_of(description: dict[str, Any], round_metrics: Mapping[str, Any]) -> list[Any]:
    """Return this run's round records in order; partitions of other runs are left alone."""
    from fedsca_pipeline.federation.server.checkpoint import RoundRecord

    mine = sorted(key for key in round_metrics if key.startswith(f"{description['fingerprint']}/"))
    return [RoundRecord.from_json(round_metrics[key]()) for key in mine]


def history_table(records: list[Any]) -> pd.DataFrame:
    """Return one row a (round, site): loss, Dice and what else was logged; round 0 is the foundation.

    A record's ``dice_validation`` belongs to the model of the round before, so it moves up one row.
    """
    import pandas as pd

    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for record in records:
        for site, entry in record.sites.items():
            if entry.absent is not None:
                continue
            rows.setdefault((record.round - 1, site), {})["dice_validation"] = entry.dice_validation
            if not record.final:
                rows.setdefault((record.round, site), {}).update(
                    loss=entry.loss, dice_local=entry.dice_local, self_weight=entry.self_weight, seconds=entry.seconds
                )
    columns = ["dice_validation", "loss", "dice_local", "self_weight", "seconds"]
    return pd.DataFrame(
        [
            {"round": round_, "site": site, **dict.fromkeys(columns), **row}
            for (round_, site), row in sorted(rows.items())
        ]
    )


SNAPSHOTS = {"before": "", "after": "last", "chosen": "best"}
"""Reported model: the snapshot of a site's that it is, in the order of tables."""


def reported(in_turn: ModelsInTurn, model: str, folder: Path) -> AbstractContextManager[SegmentationModel]:
    """Lend one of the reported models of the site whose models are in ``folder``."""
    if model == "before":
        return in_turn.foundation()
    return in_turn.saved(folder / "last_round" if model == "after" else folder)


def _mean_over_groups(weights: list[list[list[float]]]) -> Any:
    import numpy as np

    return np.asarray(weights).mean(axis=0)


def _score(network: Any, data: SiteArrays, classes: int, evaluation: EvaluationConfig) -> list[dict[str, Any]]:
    from fedsca_pipeline.data.arrays import known_classes, scored_classes
    from fedsca_pipeline.evaluation.scoring import score_batches
    from fedsca_pipeline.federation.site.batches import plain_batches
    from fedsca_pipeline.federation.site.worker import whole_model

    return score_batches(
        network,
        whole_model(network),
        plain_batches(data, "test", evaluation.batch_size),
        classes,
        evaluation.threshold,
        known=known_classes(data, classes),
        scored=scored_classes(data, classes),
    )


def _example(
    label: str, name: str, table: pd.DataFrame, data: SiteArrays, network: Any, classes: int, config: EvaluationConfig
) -> Any:
    import torch

    from fedsca_pipeline.data.arrays import known_classes
    from fedsca_pipeline.evaluation.figures import OverlayExample
    from fedsca_pipeline.metrics.images import predict_masks, truth_masks

    known = known_classes(data, classes)
    row = data.rows("test")[data.names("test").index(name)]
    images, masks, valid = map(torch.from_numpy, data.batch([row]))
    device = next(network.parameters()).device
    with torch.inference_mode():
        logits = network(network.normalise(images.to(device), valid.unsqueeze(1).to(device))).cpu()
    height, width = int(valid[0].any(1).sum()), int(valid[0].any(0).sum())
    return OverlayExample(
        label=label,
        name=name,
        dice=float(table.loc[table["image"] == name, "dice"].mean()),
        image=images[0, :, :height, :width].numpy(),
        truth=truth_masks(masks, classes)[0, :, :height, :width].numpy(),
        prediction=predict_masks(logits, network.head, config.threshold, known)[0, :, :height, :width].numpy(),
    )
