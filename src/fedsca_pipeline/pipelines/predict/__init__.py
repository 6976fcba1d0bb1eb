"""New images, segmented by a finished model."""
