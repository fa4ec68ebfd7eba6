"""What the tests on a real server share: the server's process, clients, workloads, the oracle."""
