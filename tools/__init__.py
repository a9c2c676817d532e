"""What makes and measures the project and does not ship with it; run from the repository's root.

A regular package, since "tools" without this file would yield to any installed package so named.
"""
