"""The proving ground: real policies under a virtual clock, on recorded and generated work."""
