"""The fast backend inside other libraries: one module for each, imported only when asked for.

Each needs the library it is named after, and nothing else of the package imports it.
"""
