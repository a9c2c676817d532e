"""Development tools, which are not installed; run them from the root of the repository.

A regular package, since "tools" without this file would yield to any installed package so named.
"""
