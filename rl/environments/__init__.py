"""Environments: made, stepped together, put back where they were, and the loop that collects a rollout from them."""
