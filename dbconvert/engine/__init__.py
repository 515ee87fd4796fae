"""What is done with networks: split, train, assemble, load, evaluate. Reports events, never prints."""
