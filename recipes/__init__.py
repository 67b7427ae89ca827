"""Named recipes, one YAML file each, loaded by name: ``qaware.Recipe.load("int8-weight-only")``."""
