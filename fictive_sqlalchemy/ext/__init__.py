"""One package or module for each other library; none is imported unless you import it."""
