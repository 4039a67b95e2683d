"""Training scripts, for who rebuilds what the project ships; nothing here is imported at run time."""
