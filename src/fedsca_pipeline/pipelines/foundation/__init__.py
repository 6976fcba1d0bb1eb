"""The frozen foundation: fetched, verified and converted once."""
