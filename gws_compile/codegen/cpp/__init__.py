"""The C++ kernel that samples a weight on a CPU."""
