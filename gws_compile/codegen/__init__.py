"""How Inductor writes the operators: lowerings, the loops over a weight, and a C++ kernel of our own."""
