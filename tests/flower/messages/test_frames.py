"""Frames between processes on one machine arrive whole, or are refused."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.flower.messages import frames


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@given(header=st.dictionaries(st.text(), st.none() | st.integers() | st.text(), max_size=5), payload=st.binary())
def test_a_frame_arrives_as_it_was_sent(header, payload) -> None:
    one, other = socket.socketpair()
    with one, other:
        frames.send(one, header, payload)

        assert frames.receive(other, len(payload)) == (header, payload)


def test_a_payload_larger_than_any_buffer_arrives_whole(pair) -> None:
    payload = bytes(range(256)) * 40_000
    sender = threading.Thread(target=frames.send, args=(pair[0], {}, payload))
    sender.start()

    assert frames.receive(pair[1], len(payload)) == ({}, payload)
    sender.join()


def test_a_frame_that_is_too_large_is_refused_before_it_is_read(pair) -> None:
    frames.send(pair[0], {}, b"12345")

    with pytest.raises(frames.FrameError, match="larger than the 4 allowed"):
        frames.receive(pair[1], 4)


@pytest.mark.parametrize("text", [b"no json", b"[1]", b'"text"'])
def test_a_header_that_is_not_a_json_object_is_refused(pair, text) -> None:
    pair[0].sendall(frames._LENGTHS.pack(len(text), 0) + text)

    with pytest.raises(frames.FrameError):
        frames.receive(pair[1], 10)


def test_a_connection_closed_in_the_middle_of_a_frame_is_an_error(pair) -> None:
    pair[0].sendall(frames._LENGTHS.pack(2, 100) + b"{}half")
    pair[0].close()

    with pytest.raises(EOFError):
        frames.receive(pair[1], 100)


def test_a_listening_socket_is_private_to_the_user_and_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "private" / "s"
    frames.listen(path).close()

    with frames.listen(path) as listener, frames.connect(path, 5.0) as connection:
        frames.send(connection, {"hello": 1})
        accepted, _ = listener.accept()
        with accepted:
            assert frames.receive(accepted, 0) == ({"hello": 1}, b"")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_path_too_long_for_a_socket_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long"):
        frames.listen(tmp_path / ("x" * 120))


def test_the_folder_of_a_socket_becomes_private_to_the_user_even_if_it_was_open(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o755)

    with frames.listen(folder / "s"):
        assert folder.stat().st_mode & 0o777 == 0o700
