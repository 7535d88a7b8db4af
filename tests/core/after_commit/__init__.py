"""``on_commit()`` and ``on_rollback()``: what is called, when, and how often."""
