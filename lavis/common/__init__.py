"""Registry, typed configuration and the small services every other package uses."""
