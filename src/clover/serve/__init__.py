"""Answers over the network: the local endpoint, the engine, the API and the page."""
