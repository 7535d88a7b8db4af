"""Models that store themselves: what each call sends, what it refuses, what an error leaves."""
