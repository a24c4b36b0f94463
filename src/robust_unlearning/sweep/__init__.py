"""Many runs for little more than one: a grid of recipes, trained side by side, scored over one base, one chosen."""
