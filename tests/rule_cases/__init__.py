"""The cases of the table's rows, by families of operators; importing a module registers its cases."""
