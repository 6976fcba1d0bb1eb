"""FEL and LAT's tensor side: adapter modules, their PEFT registration, and which tensors sit in which block."""
