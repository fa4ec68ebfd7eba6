"""Builders for tests of the scheduler and the simulator."""
