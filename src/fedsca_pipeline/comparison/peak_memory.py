"""Peak memory of this process within a block of code."""

from __future__ import annotations

from pathlib import Path

# Linux: writing 5 resets the high-water mark to the current resident memory.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """A context manager; ``bytes`` is the highest resident memory within the block, None if the system is not Linux.

    Only Linux can reset its high-water mark, so that each block in a process has its own peak.
    """

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        try:
            _RESET.write_text("5")
            self._reset = True
        except OSError:
            self._reset = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._reset:
            marks = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
            self.bytes = int(marks[0].split()[1]) * 1024 if marks else None
