"""A finished model on new images: masks, overlays and a table."""
