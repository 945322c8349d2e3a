"""Folders of converted models: written all or nothing, loaded, described by a card, pushed to the hub."""
