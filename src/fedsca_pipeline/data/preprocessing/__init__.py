"""From a site folder to validated, split and cached arrays."""
