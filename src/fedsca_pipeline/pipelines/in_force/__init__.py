"""The parameters in force, for DVC."""
