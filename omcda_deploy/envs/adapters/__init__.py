"""Between this package's environments and everybody else's: PettingZoo's parallel API, and checks."""
