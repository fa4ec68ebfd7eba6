"""Replays workloads against any server that speaks OpenAI's API: `python -m benchmark.replay`."""
