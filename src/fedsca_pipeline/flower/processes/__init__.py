"""Start Flower's executables and other child processes, and end them with their parent."""
