"""Two commands in one project folder."""

from __future__ import annotations

from fedsca_pipeline.files import open_locked


def test_a_second_command_says_who_holds_the_data_root_and_changes_nothing(used) -> None:
    before, runs = used.contents(), len(used.parents())

    with open_locked(used.data / ".lock") as lock:
        lock.truncate(0)
        lock.write("process 1 (kedro run), since noon")
        lock.flush()
        refused = used.run(params="federation.rounds=1,force=true")

    assert refused.code == 1
    assert "in use by process 1 (kedro run), since noon; wait until it ends" in refused.words
    assert "Traceback" not in refused.output
    assert used.contents() == before
    assert len(used.parents()) == runs


def test_an_up_to_date_check_needs_no_lock(used, rounds) -> None:
    with open_locked(used.data / ".lock"):
        again = used.run(params=f"federation.rounds={rounds}")

    assert again.code == 0, again.output
    assert "up to date" in again.stdout
