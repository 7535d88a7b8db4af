"""Other libraries, used for real beside ours. What was found is in docs/neighbours.md."""
