"""How a routed module is executed: `reference` is the specification, `packed` does only the kept tokens'
work.
"""
