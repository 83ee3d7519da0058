"""Export of a backbone to formats that other libraries load: one module per target, and the check of the result."""
