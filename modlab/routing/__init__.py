"""Who is kept: the one rule, the routers, decisions and recordings, the live state of a converted model."""
