"""The most memory that this process held within a block."""

from __future__ import annotations

from pathlib import Path

# Linux: writing 5 sets the high-water mark back to what is resident now.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """A context manager; ``bytes`` is the highest resident memory within it, None where the system does not tell.

    Only Linux can set its mark back, so that many blocks in one process each have their own.
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        try:
            _RESET.write_text("5")
            self._known = True
        except OSError:
            self._known = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._known:
            marks = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
            self.bytes = int(marks[0].split()[1]) * 1024 if marks else None
