"""The coordinator of a deployed federation: sites join, train and test."""
