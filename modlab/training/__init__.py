"""Training of routers and models on accelerate."""
