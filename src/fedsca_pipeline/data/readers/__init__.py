"""Image and volume files to arrays, one module per kind of file."""
