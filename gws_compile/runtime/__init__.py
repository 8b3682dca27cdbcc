"""What a compiled graph needs at each call: names and keys of weights, and the clock of the draws."""
