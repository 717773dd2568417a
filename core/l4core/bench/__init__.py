"""`l4 bench`: how fast an engine or a server is, beside what the device's memory allows. Nothing of L4 imports this room but the command line."""
