"""The processes of a run: how they meet, where they compute, and what they exchange."""
