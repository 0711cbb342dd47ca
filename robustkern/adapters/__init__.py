"""Other frameworks' own names and conventions over the rules: a module a framework, each an optional extra."""
