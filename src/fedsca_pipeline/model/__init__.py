"""The foundation with its adapters, and a finished site model."""
