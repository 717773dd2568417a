"""From a config to a running engine: what is chosen, read, sized and reported."""
