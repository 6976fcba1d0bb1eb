"""What travels over Flower beside the messages of a round."""
