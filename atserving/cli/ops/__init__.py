"""The commands of operators, over the registry's ``AdminService``."""
