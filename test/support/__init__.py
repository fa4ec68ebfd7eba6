"""What the tests on a real server share beside `harness`: workloads, the oracle, listeners."""
