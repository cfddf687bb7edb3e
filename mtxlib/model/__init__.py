"""The network and its training. Torch only: with `config`, `files` and `data.store` this wing runs where no music
library is installed, and nothing here knows what a score is."""
