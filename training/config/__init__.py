"""Everything that decides a run: recipes, rows of the tables, settings."""
