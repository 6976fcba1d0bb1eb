"""The audit log of what crosses a border."""
