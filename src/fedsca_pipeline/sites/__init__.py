"""From a raw site folder to validated, split, cached arrays (DESIGN section 6)."""
