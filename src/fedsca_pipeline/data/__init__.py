"""From a raw site folder to validated, split, cached arrays (docs/data.md)."""
