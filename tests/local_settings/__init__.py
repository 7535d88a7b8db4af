"""``session.set_local()``: settings that travel with whatever a session sends."""
