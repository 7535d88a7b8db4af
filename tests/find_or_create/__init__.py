"""Tests of filter_by_or_create: one row for one key, however many ask for it."""
