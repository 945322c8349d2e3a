"""The one exception type that modlab raises for mistakes a user can correct."""


class ModlabError(ValueError):
    """A setting, input or file is wrong; the message says which, with what value, and what to do."""
