"""Architectures of the papers that no library ships in this form; one file a family, each with `build`."""
