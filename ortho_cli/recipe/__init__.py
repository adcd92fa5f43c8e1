"""Recipes: YAML files that say what a command should do. No torch here; pydantic only in the modules that need it.

`parse` turns text into data and line numbers, `load` checks data against a schema and `explain` says what does not fit,
`verbs` holds the schema of the checkpoint verbs, `train` that of training (one file a section: `tasks`, `models`,
`data`, `methods`, `optim`, `run`), `overrides` and `matrix` change single keys of it, `write` prints recipes, `shipped`
finds the package's own, and `catalog` takes any of them.
"""
