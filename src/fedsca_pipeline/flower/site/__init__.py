"""A hospital's side of a deployed federation: the ``fedsca-site`` command."""
