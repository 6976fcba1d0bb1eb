"""The audit log: a record of every message that a site or the coordinator sends or receives."""
