"""The command line: one thin module per subcommand that parses, calls the verb, and renders."""
