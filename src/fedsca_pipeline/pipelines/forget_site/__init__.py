"""All that is kept of a site, deleted."""
