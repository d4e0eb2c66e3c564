"""Pages for looking and sharing: grids of samples, and adapters as cards. Plain HTML that needs no network."""
