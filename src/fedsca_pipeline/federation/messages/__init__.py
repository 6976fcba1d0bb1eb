"""The messages that cross the wire: manifest and tensors."""
