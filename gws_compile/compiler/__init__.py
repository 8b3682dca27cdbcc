"""The protocol of torch.compile: rewriting a graph, compiling it, binding what its calls need, saying what is odd."""
