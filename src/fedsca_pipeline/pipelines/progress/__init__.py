"""Progress bars of long work."""
