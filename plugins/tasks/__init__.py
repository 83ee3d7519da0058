"""The built-in tasks of `sinder evaluate`: a module each, found through entry points, as anyone's are."""
