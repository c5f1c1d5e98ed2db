"""How tests run on MPI ranks: plugin.py says who is who, tests/conftest.py what a test module needs to know."""
