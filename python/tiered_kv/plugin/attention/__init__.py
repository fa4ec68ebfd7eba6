"""Cascade attention and the CPU's attention, as SGLang's backends."""
