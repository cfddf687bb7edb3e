"""A score: what it is, how it is read, measured, written and shown. Numbers are numpy; no torch, no model."""
