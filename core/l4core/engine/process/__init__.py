"""Engines as processes: one or a rank each, what they say to the server and to each other, how they end."""
