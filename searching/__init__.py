"""Members of a pool under a budget: what each costs on a device, how good it is likely to be, and which to take."""
