"""Thin glue to training frameworks; each module imports its framework, the library does not."""
