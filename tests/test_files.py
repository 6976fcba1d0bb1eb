"""Files are written whole or not at all, and damaged ones are refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import (
    LockHeld,
    atomic_path,
    fingerprint,
    interrupts_deferred,
    open_locked,
    read_json,
    read_or_create_secret,
    read_sealed,
    read_tensors,
    remove_partial_files,
    sealed,
    sha256_file,
    unsealed,
    write_bytes,
    write_json,
    write_sealed,
    write_tensors,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=10,
)


def reordered(value: object) -> object:
    """Return the same JSON value with the keys of every mapping in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_write_that_fails_leaves_the_old_content_and_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    with pytest.raises(RuntimeError, match="half-way"):
        write_half(path, RuntimeError("half-way"))

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_content_and_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_deferred_interrupt_takes_effect_after_the_block_even_if_the_block_fails() -> None:
    seen = []

    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        seen.append("the rest of the block")
        raise OSError

    assert seen == ["the rest of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_block_only_if_it_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        seen.append("an early one waits")
        monkeypatch.setattr("fedsca_pipeline.files._PATIENCE", 0.0)
        signal.raise_signal(signal.SIGINT)
        seen.append("a late one does not")

    assert seen == ["an early one waits"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    with pytest.raises(OSError, match="No space left") as caught:
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))

    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "results.json"):
        (tmp_path / "source.png").read_bytes()

    assert caught.value.filename == str(tmp_path / "source.png")


def test_new_content_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"

    assert path.read_text() == "new"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "data.bin"

    write_bytes(path, b"data")

    assert path.read_bytes() == b"data"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask_whatever_wrote_them(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "bytes", b"")
        write_tensors(tmp_path / "tensors", {})
        write_bytes(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(before)

    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("bytes", "tensors", "secret")]
    assert modes == [mode, mode, 0o600]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_nan_and_infinity_are_refused_in_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", value)

    assert list(tmp_path.iterdir()) == []


@given(value=JSON)
def test_json_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"

    write_json(path, value)

    assert read_json(path) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "strided": torch.arange(6).reshape(2, 3).T.to(dtype)}

    write_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    found = read_tensors(tmp_path / "t.safetensors")

    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensors[name]) and found[name].dtype == dtype for name in tensors)


def test_a_full_disk_under_tensors_is_an_error_of_the_system_with_its_file(tmp_path: Path, monkeypatch) -> None:
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)

    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})

    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_of_the_disk_is_raised_unchanged(tmp_path: Path, monkeypatch) -> None:
    def broken(*_, **__):
        raise SafetensorError("invalid header")

    monkeypatch.setattr("safetensors.torch.save_file", broken)

    with pytest.raises(SafetensorError, match="invalid header"):
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})


def test_no_tensors_make_a_file_without_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {})

    assert read_tensors(tmp_path / "t.safetensors") == {}


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")

    found = sha256_file(tmp_path / "empty")

    assert found == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(value=JSON)
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value: object) -> None:
    assert fingerprint(reordered(value)) == fingerprint(value)
    assert len(fingerprint(value)) == 16


@given(one=JSON, other=JSON)
def test_different_values_have_different_fingerprints(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)

    assert (fingerprint(one) == fingerprint(other)) == same


def test_ctrl_c_during_a_read_of_tensors_is_raised_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    import safetensors.torch

    done = []

    def load(path: Path) -> dict:
        signal.raise_signal(signal.SIGINT)
        done.append(path)
        return {}

    monkeypatch.setattr(safetensors.torch, "load_file", load)
    with pytest.raises(KeyboardInterrupt):
        read_tensors(tmp_path / "a.safetensors")

    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_secret_is_drawn_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    secret = read_or_create_secret(tmp_path / "key")

    assert read_or_create_secret(tmp_path / "key") == secret != read_or_create_secret(tmp_path / "other")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "abc", "G" * 64, "a" * 63])
def test_a_file_that_is_not_a_secret_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)

    with pytest.raises(ValueError, match="key: not the secret that was written there"):
        read_or_create_secret(tmp_path / "key")

    assert (tmp_path / "key").read_text() == content


def test_a_second_holder_of_a_lock_is_refused_with_what_the_first_wrote_until_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with open_locked(path) as file:
        file.write("the first")
        file.flush()
        for _ in range(2):
            with pytest.raises(LockHeld, match="the first"):
                open_locked(path)

    open_locked(path).close()


def test_a_process_that_inherits_the_lock_holds_it_until_it_ends(tmp_path: Path) -> None:
    with open_locked(tmp_path / "lock") as lock:
        heir = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with pytest.raises(LockHeld):
        open_locked(tmp_path / "lock")

    heir.communicate(b"\n")

    open_locked(tmp_path / "lock").close()


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    with open_locked(tmp_path / "lock") as lock:
        heir = subprocess.Popen(["sleep", "0.5"], pass_fds=[lock.fileno()])

    with open_locked(tmp_path / "lock", 60.0):
        assert heir.wait() == 0


def test_partial_files_are_removed_but_from_a_folder_that_others_write_to(tmp_path: Path) -> None:
    for folder in (".a.json.ab.partial", "site/.b.csv.cd.partial", "_shared/.c.ef.partial", "site/whole"):
        write_bytes(tmp_path / folder / "x", b"")

    remove_partial_files(tmp_path, but="_shared")

    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("x")} == {
        "_shared/.c.ef.partial/x",
        "site/whole/x",
    }


def test_every_flipped_bit_of_a_sealed_file_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(3.0), "b": torch.tensor([True]), "c": torch.ones(0)}
    write_sealed(path, tensors, {"run": "r", "round": 1})
    content, same = path.read_bytes(), 0
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            label, found = read_sealed(path, run="r", round=1)
        except WeightsError as error:
            assert "a.safetensors" in str(error)  # noqa: PT017 - of every flipped bit, some are refused
        else:
            same += 1
            assert label == {"run": "r", "round": 1}
            assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    assert same < len(content)


def test_a_sealed_file_of_another_label_is_named(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.safetensors", {}, {"run": "r"})

    with pytest.raises(WeightsError, match=r"a\.safetensors: belongs to run 'r' in place of 'q'"):
        read_sealed(tmp_path / "a.safetensors", run="q")


@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, {"a": 1, "sha256": "0" * 64}, {**sealed({"a": 1}), "a": 2}])
def test_a_changed_object_is_not_unsealed(value: object) -> None:
    with pytest.raises(ValueError, match="checksum"):
        unsealed(value)
