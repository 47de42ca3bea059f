"""Callbacks for training frameworks; each module needs the extra of its name, `lightning` or `transformers`."""
