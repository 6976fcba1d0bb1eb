"""The federated rounds, checkpointed, and each site's model written out."""
