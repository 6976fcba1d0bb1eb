"""One site's work in a round: local training, validation and what it keeps."""
