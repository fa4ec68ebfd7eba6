"""A real server and what asks it: shared by the tests and the benchmarks."""
