"""One site's work in a round: local training, validation, and the files it stores."""
