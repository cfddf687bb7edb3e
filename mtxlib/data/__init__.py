"""Scores as tokens on disk. `tokens` is the one place that knows MidiTok; `store` needs torch and numpy only."""
