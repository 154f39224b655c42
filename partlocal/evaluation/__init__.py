"""Arrays in, numbers out: verification, identification and parsing scores."""
