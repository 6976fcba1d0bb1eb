"""What travels over Flower: documents, frames, and the check of each message's content."""
