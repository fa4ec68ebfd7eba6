"""How the plugin gets into SGLang's processes, and what a process without it says."""
