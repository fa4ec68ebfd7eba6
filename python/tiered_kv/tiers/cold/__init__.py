"""Cold stores: what keeps pages below the host, nearest first."""
