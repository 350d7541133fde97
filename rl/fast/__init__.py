"""What stands in for shown code because it is faster, and how it proves itself against that code."""
