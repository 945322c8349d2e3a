"""How a routed module runs: `reference` is the specification, `packed` does only the kept tokens' work."""
