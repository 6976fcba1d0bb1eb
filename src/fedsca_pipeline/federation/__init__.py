"""The rounds: messages, local training, the round loop, checkpoints and the in-process fleet."""
