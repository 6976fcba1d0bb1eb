"""The foundation with its adapters, and the finished model of a site."""
