"""Every private torch API that the project touches, in one place.

Each function says what it relies on and the versions of torch that it was checked on; where a name is missing the error
names it and these versions.

- `lookup`: finding a private name, the error, the versions. `private_names`: all of them, with the features they serve.
- `graphs`: the graphs that Dynamo hands to a backend. `stack_trace`: where in the user's code a node comes from.
- `dynamo`: Dynamo at work: compilations, what is not traced, errors, torch's records.
- `fake_tensors`, `autograd`, `distributed`: fake tensors, the autograd engine, DTensors and process groups.
- `compilers`: compilers behind the rewrite, and the wrappers of compiled models.
- `inductor`: what a lowering is written with. `cpp_template`: a C++ kernel in Inductor's graph.
"""
