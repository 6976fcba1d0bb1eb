"""Progress bars on the terminal."""
