"""The computational graph of a compiled function: launches, and the tensors that go from one to another."""
