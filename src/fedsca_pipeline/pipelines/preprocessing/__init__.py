"""From a raw site folder to its manifest, data report and cached arrays; one namespace a site."""
