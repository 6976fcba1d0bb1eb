from __future__ import annotations

import io

from rich.console import Console

from fedsca_pipeline.federation.server.records import RoundRecord, SiteRecord
from fedsca_pipeline.pipelines.progress.rounds import RoundProgress


def shown(*records: RoundRecord) -> str:
    stream = io.StringIO()
    with RoundProgress(("a", "b"), 2, Console(file=stream, width=120)) as progress:
        progress.step("a", 1, 4, 0.25)
        progress.step("b", 1, 2, 0.5)
        for record in records:
            progress.round_done(record)
    return stream.getvalue()


def test_a_round_leaves_one_line_with_loss_dice_sites_and_bytes() -> None:
    site = SiteRecord(bytes_up=1_500_000, loss=0.5, dice_validation=0.25)

    text = shown(RoundRecord(round=1, final=False, sites={"a": site, "b": site}))

    assert "round 1/2: loss 0.500, Dice of round 0 0.250, 2 of 2 sites, 3.00 MB up" in text


def test_a_run_of_one_site_says_site() -> None:
    record = RoundRecord(round=1, final=False, sites={"a": SiteRecord(loss=0.5, dice_validation=0.25)})

    assert "1 of 1 site, 0.00 MB up" in shown(record)


def test_an_absent_site_is_shown_with_the_reason() -> None:
    sites = {"a": SiteRecord(loss=0.5, dice_validation=0.25), "b": SiteRecord(absent="power cut")}

    assert "b: absent (power cut)" in shown(RoundRecord(round=1, final=False, sites=sites))


def test_the_final_line_shows_the_last_round() -> None:
    sites = {"a": SiteRecord(dice_validation=0.75), "b": SiteRecord(dice_validation=0.25)}

    assert "round 2/2: validation Dice 0.500" in shown(RoundRecord(round=3, final=True, sites=sites))


def bars(*steps: tuple[str, int, int]) -> str:
    """Return the live bars as a terminal shows them after these steps."""
    stream = io.StringIO()
    with RoundProgress(("a", "b"), 2, Console(file=stream, width=120, force_terminal=True, color_system=None)) as shown:
        for site, step, steps_ in steps:
            shown.step(site, step, steps_, 0.25)
    return stream.getvalue().rpartition("rounds")[2]


def test_sites_that_train_in_parallel_have_a_bar_each() -> None:
    text = bars(("a", 1, 4), ("b", 1, 2), ("a", 2, 4))

    assert "a " in text
    assert "2/4 loss 0.250" in text
    assert "b " in text
    assert "1/2 loss 0.250" in text


def test_the_bar_of_a_finished_site_disappears() -> None:
    text = bars(("a", 1, 2), ("b", 1, 3), ("a", 2, 2))

    assert "1/3 loss" in text
    assert "2/2 loss" not in text


def test_a_restarted_site_does_not_count_twice() -> None:
    progress = RoundProgress(("a", "b"), 2, Console(file=io.StringIO()))

    for step in (1, 2, 1):
        progress.step("a", step, 4, 0.25)

    assert progress._bars.tasks[0].completed == 0.25 / 2


def test_a_private_loss_is_not_shown() -> None:
    stream = io.StringIO()
    with RoundProgress(("a",), 2, Console(file=stream, width=120, force_terminal=True, color_system=None)) as progress:
        progress.step("a", 1, 4, None)
        progress.round_done(RoundRecord(round=1, final=False, sites={"a": SiteRecord(dice_validation=0.25)}))

    assert "loss 0" not in stream.getvalue()
    assert "round 1/2: loss -, Dice of round 0 0.250" in stream.getvalue()
