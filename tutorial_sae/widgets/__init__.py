"""What notebooks show besides figures."""
