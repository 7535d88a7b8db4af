"""One package or module per outside library; none is imported unless you import it."""
